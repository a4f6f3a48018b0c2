"""DeepSeek-V2 and V3 in GGUF: llama.cpp's architecture ``deepseek2``.

MLA is stored as it is decoded, absorbed: one key-value head of the latent's width, and
``kv_b_proj`` as two tensors, each head's keys transposed and its values. RoPE rows stay in adjacent
pairs. The experts of a layer are one tensor. MTP modules are left out: that architecture has none.

Names and fields: ``gguf.constants`` of the library (``MODEL_ARCH.DEEPSEEK2``), and what llama.cpp's
own converter writes in them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fathom.attention import MLAConfig
from fathom.config import ModelConfig
from fathom.convert.gguf_item import Item
from fathom.convert.save import Export
from fathom.ffn import DenseConfig, MoEConfig
from fathom.layers.base import require
from fathom.layers.rope import YarnScaling

ARCHITECTURE = "deepseek2"
FRAME = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
GATING = {"softmax": 1, "sigmoid": 2}


def parts_of(cfg: ModelConfig) -> tuple[MLAConfig, MoEConfig, int]:
    """The attention, the MoE, and how many dense layers come before the first.

    Raises:
        ValueError: what that architecture has no field for.
    """
    layers = cfg.layers()
    n_dense = sum(isinstance(group.ffn, DenseConfig) for group in layers)
    attention, moe = layers[0].attention, layers[-1].ffn
    plain = type(attention) is MLAConfig and isinstance(moe, MoEConfig)
    plain = plain and all(group.attention == attention for group in layers)
    plain = plain and all(group.ffn == moe for group in layers[n_dense:])
    if not plain or not isinstance(attention, MLAConfig) or not isinstance(moe, MoEConfig):
        raise ValueError(
            "of DeepSeek's shapes GGUF has those of V2 and V3: MLA in every layer, dense layers "
            "first and equal MoE layers after them; use format='hf' for this one"
        )
    require(not attention.bias, "GGUF's deepseek2 has no biases in its attention")
    require(
        moe.score_func in GATING, f"GGUF's deepseek2 has no gate of the kind {moe.score_func!r}"
    )
    require(
        moe.n_expert_groups == 1 or moe.group_score == "top2",
        "llama.cpp scores a group of experts by its best two; this model, as V2, by its best",
    )
    return attention, moe, n_dense


def deepseek_items(export: Export) -> list[Item]:
    """Every tensor of the file, layer by layer."""
    attention, moe, _ = parts_of(export.cfg)
    items = _as_they_are(export, FRAME, "", "")
    for index in range(export.cfg.n_layers):
        theirs, ours = f"model.layers.{index}.", f"blk.{index}."
        items += _as_they_are(export, LAYER, theirs, ours)
        items += _keys_values(theirs, ours, attention)
        items += _experts(export, theirs, ours, moe)
    return items


def _as_they_are(export: Export, names: Mapping[str, str], theirs: str, ours: str) -> list[Item]:
    """Those of the tensors that this layer has; the router's weights in float32."""
    found = {to: theirs + name for name, to in names.items()}
    entries = export.source.entries
    return [
        Item(ours + to, entries[name].shape, (name,), _only, wide=to == "ffn_gate_inp.weight")
        for to, name in found.items()
        if name in entries
    ]


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _keys_values(theirs: str, ours: str, cfg: MLAConfig) -> list[Item]:
    """``kv_b_proj`` for the absorbed form."""
    source = (theirs + "self_attn.kv_b_proj.weight",)

    def keys(tensors: Sequence[Tensor]) -> Tensor:
        up = _only(tensors).unflatten(0, (cfg.n_heads, -1))
        return up[:, : cfg.qk_nope_head_dim].transpose(1, 2)

    def values(tensors: Sequence[Tensor]) -> Tensor:
        return _only(tensors).unflatten(0, (cfg.n_heads, -1))[:, cfg.qk_nope_head_dim :]

    k_shape = (cfg.n_heads, cfg.kv_lora_rank, cfg.qk_nope_head_dim)
    v_shape = (cfg.n_heads, cfg.v_head_dim, cfg.kv_lora_rank)
    return [
        Item(ours + "attn_k_b.weight", k_shape, source, keys),
        Item(ours + "attn_v_b.weight", v_shape, source, values),
    ]


def _experts(export: Export, theirs: str, ours: str, moe: MoEConfig) -> list[Item]:
    if f"{theirs}mlp.gate.weight" not in export.source.entries:
        return []
    items = []
    for part in ("gate", "up", "down"):
        names = tuple(
            f"{theirs}mlp.experts.{e}.{part}_proj.weight" for e in range(moe.n_routed_experts)
        )
        shape = (moe.n_routed_experts, *export.source.entries[names[0]].shape)
        items.append(Item(f"{ours}ffn_{part}_exps.weight", shape, names, _stacked))
    return items


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def deepseek_fields(export: Export) -> dict[str, Any]:
    """The shape, the routing and the position, under the architecture's names.

    Raises:
        ValueError: what it has no field for.
    """
    cfg = export.cfg
    attention, moe, n_dense = parts_of(cfg)
    require(
        export.config.get("rope_interleave", True) is True,
        "GGUF's deepseek2 has RoPE rows in adjacent pairs, and this model's config says "
        "rope_interleave=false: use format='hf'",
    )
    said = {
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.max_seq_len,
        "embedding_length": cfg.dim,
        "block_count": cfg.n_layers,
        "leading_dense_block_count": n_dense,
        "feed_forward_length": int(export.config["intermediate_size"]),
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": 1,  # absorbed, all heads read one latent
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.kv_lora_rank + attention.qk_rope_head_dim,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "rope.dimension_count": attention.qk_rope_head_dim,
        "rope.freq_base": attention.position.theta,
        "expert_count": moe.n_routed_experts,
        "expert_used_count": moe.top_k,
        "expert_shared_count": moe.n_shared_experts,
        "expert_feed_forward_length": moe.inter_dim,
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_weights_scale": float(moe.route_scale),
        "expert_gating_func": GATING[moe.score_func],
        **_scaling(attention),
    }
    if attention.q_lora_rank is not None:
        said["attention.q_lora_rank"] = attention.q_lora_rank
    if moe.n_expert_groups > 1:
        said["expert_group_count"] = moe.n_expert_groups
        said["expert_group_used_count"] = moe.n_limited_groups
    return {f"{ARCHITECTURE}.{name}": value for name, value in said.items()}


def _scaling(attention: MLAConfig) -> dict[str, Any]:
    """YaRN as DeepSeek uses it: all of its correction is on the softmax scale."""
    scaling = attention.position.scaling
    if scaling is None:
        return {}
    known = isinstance(scaling, YarnScaling) and scaling == YarnScaling(
        factor=scaling.factor,
        original_seq_len=scaling.original_seq_len,
        mscale=scaling.mscale_all_dim,
        mscale_all_dim=scaling.mscale_all_dim,
    )
    if not known or not isinstance(scaling, YarnScaling) or scaling.mscale_all_dim is None:
        raise ValueError(f"GGUF's deepseek2 has no field for the RoPE scaling {scaling}")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_seq_len,
        "rope.scaling.yarn_log_multiplier": 0.1 * scaling.mscale_all_dim,
    }
