"""``config.json`` of DeepSeek V1, V2, V3 (Moonlight, Kimi-K2) and V3.2, to a model and back.

The three differ in the attention (Llama's, then MLA) and in how the router chooses: V1 the best by
softmax; V2 the same, or within the groups whose best expert is best; V3 by sigmoid plus a bias,
within the groups whose two best are best. V3.2 is V3 with an indexer in every layer.
"""

from collections.abc import Callable
from typing import Any

from fathom.attention import AttentionConfig, DSAConfig, MHAConfig, MLAConfig
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.convert.hf_config import (
    LONG,
    TINY,
    HFConfig,
    read_frame,
    read_position,
    write_frame,
    write_position,
)
from fathom.convert.llama import read_mha, write_mha
from fathom.ffn import DenseConfig, FFNConfig, MoEConfig
from fathom.ffn.balance import AnyBalance, AuxLoss, SeqAuxLoss
from fathom.layers.base import require
from fathom.layers.position import RopeConfig

MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")  # the second is transformers' own


def read_v1(hf: HFConfig) -> ModelConfig:
    """Model type ``deepseek``."""
    return _read(hf, read_mha(hf), read_v1_moe)


def read_v2(hf: HFConfig) -> ModelConfig:
    """Model type ``deepseek_v2``."""
    return _read(hf, read_mla(hf), read_v2_moe)


def read_v3(hf: HFConfig) -> ModelConfig:
    """Model types ``deepseek_v3`` and ``kimi_k2``."""
    hf.flag("rope_interleave", True)
    n_mtp = next((hf.integer(key, least=0, most=16) for key in MTP_KEYS if hf.has(key)), 0)
    return _read(hf, read_mla(hf), read_v3_moe, n_mtp)


def read_v32(hf: HFConfig) -> ModelConfig:
    """Model type ``deepseek_v32``."""
    n_layers = hf.integer("num_hidden_layers", most=1000)
    n_dense = min(hf.integer("first_k_dense_replace", least=0, most=TINY), n_layers)
    hf.only("layer_types", (["indexed_attention"] * n_layers,))
    hf.only("mlp_layer_types", (["dense"] * n_dense + ["sparse"] * (n_layers - n_dense),))
    hf.flag("rope_interleave", True)
    n_mtp = next((hf.integer(key, least=0, most=16) for key in MTP_KEYS if hf.has(key)), 0)
    return _read(hf, read_dsa(hf), read_v3_moe, n_mtp)


def _read(
    hf: HFConfig,
    attention: AttentionConfig,
    read_moe: Callable[[HFConfig], MoEConfig],
    n_mtp: int = 0,
) -> ModelConfig:
    """The frame, the first dense layers, the MoE layers above them."""
    hf.only("mlp_bias", (False,))
    count = hf.integer("num_hidden_layers", most=1000)
    first_moe = hf.integer("first_k_dense_replace", least=0, most=TINY)
    layers: list[tuple[int, FFNConfig]] = []
    if first_moe:
        dense = DenseConfig(inter_dim=hf.integer("intermediate_size", most=2**20))
        layers.append((min(first_moe, count), dense))
    if first_moe < count:
        layers.append((count - first_moe, read_moe(hf)))
    elif n_mtp and first_moe < count + n_mtp:
        raise hf.refuse("first_k_dense_replace", "but MTP modules are like the last layer here")
    groups = tuple(LayerGroup(count=n, attention=attention, ffn=ffn) for n, ffn in layers)
    return read_frame(hf, groups, MTPConfig(n_mtp_modules=n_mtp) if n_mtp else None)


def read_mla(hf: HFConfig) -> MLAConfig:
    hf.named("q_lora_rank")  # null: queries are not compressed
    n_heads = hf.integer("num_attention_heads", most=TINY)
    hf.only("num_key_value_heads", (n_heads,), why="(a key-value head per head)")
    return MLAConfig(
        n_heads=n_heads,
        q_lora_rank=hf.integer("q_lora_rank") if hf.has("q_lora_rank") else None,
        kv_lora_rank=hf.integer("kv_lora_rank"),
        qk_nope_head_dim=hf.integer("qk_nope_head_dim"),
        qk_rope_head_dim=hf.integer("qk_rope_head_dim"),
        v_head_dim=hf.integer("v_head_dim"),
        position=read_position(hf),
        bias=hf.flag("attention_bias"),
    )


def read_dsa(hf: HFConfig) -> DSAConfig:
    return DSAConfig.beside(
        read_mla(hf),
        index_n_heads=hf.integer("index_n_heads", most=TINY),
        index_head_dim=hf.integer("index_head_dim"),
        index_topk=hf.integer("index_topk", most=LONG),
    )


def _read_experts(hf: HFConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": hf.integer("n_routed_experts", most=TINY),
        "n_shared_experts": hf.integer("n_shared_experts", 0, least=0, most=TINY),
        "top_k": hf.integer("num_experts_per_tok", most=TINY),
        "inter_dim": hf.integer("moe_intermediate_size"),
    }


def read_v1_moe(hf: HFConfig) -> MoEConfig:
    hf.only("scoring_func", ("softmax",))
    hf.only("topk_method", ("greedy",))
    hf.only("routed_scaling_factor", (1,))
    experts = _read_experts(hf)
    norm = hf.flag("norm_topk_prob") and experts["top_k"] > 1  # of one, V1 keeps the score
    return MoEConfig(**experts, norm_topk_prob=norm, balance=_read_balance(hf))


def read_v2_moe(hf: HFConfig) -> MoEConfig:
    hf.only("scoring_func", ("softmax",))
    hf.only("topk_method", ("greedy", "group_limited_greedy"))
    hf.only("norm_topk_prob", (False,), why="(transformers ignores it, V2's own code does not)")
    return MoEConfig(
        **_read_experts(hf),
        **(_read_groups(hf) if hf.data.get("topk_method") == "group_limited_greedy" else {}),
        group_score="max",
        route_scale=hf.number("routed_scaling_factor"),
        balance=_read_balance(hf),
    )


def read_v3_moe(hf: HFConfig) -> MoEConfig:
    hf.only("scoring_func", ("sigmoid",))
    hf.only("topk_method", ("noaux_tc",))
    hf.named("norm_topk_prob")
    return MoEConfig(
        **_read_experts(hf),
        **_read_groups(hf),
        score_func="sigmoid",
        group_score="top2",
        norm_topk_prob=hf.flag("norm_topk_prob"),
        route_scale=hf.number("routed_scaling_factor"),
        expert_bias=True,
    )


def _read_groups(hf: HFConfig) -> dict[str, Any]:
    return {
        "n_expert_groups": hf.integer("n_group", most=TINY),
        "n_limited_groups": hf.integer("topk_group", most=TINY),
    }


def _read_balance(hf: HFConfig) -> tuple[AnyBalance, ...]:
    """The loss that V1's and V2's own code adds in training."""
    if not hf.data.get("aux_loss_alpha"):
        return ()
    coeff = hf.number("aux_loss_alpha")
    if hf.flag("seq_aux", True):
        return (SeqAuxLoss(seq_aux_loss_coeff=coeff),)
    return (AuxLoss(aux_loss_coeff=coeff),)


# --- Writing ---------------------------------------------------------------------------------


def write_v1(cfg: ModelConfig) -> dict[str, Any]:
    """The reverse of :func:`read_v1`; ``ValueError``: V1 has no such part."""
    moe, data = _write(cfg)
    require(moe is not None and cfg.mtp is None, "DeepSeek V1 has experts, and no MTP")
    assert moe is not None
    plain = moe.score_func == "softmax" and moe.n_expert_groups == 1 and not moe.has_expert_bias
    require(
        plain and moe.route_scale == 1 and (moe.top_k > 1 or not moe.norm_topk_prob),
        "the router of DeepSeek V1 takes the best by softmax: no groups, bias or route_scale",
    )
    return data | {"scoring_func": "softmax", **_write_balance(moe)}


def write_v2(cfg: ModelConfig) -> dict[str, Any]:
    """The reverse of :func:`read_v2`; ``ValueError``: V2 has no such part."""
    moe, data = _write(cfg)
    require(moe is not None and cfg.mtp is None, "DeepSeek V2 has experts, and no MTP")
    assert moe is not None
    grouped = moe.n_expert_groups > 1
    require(
        moe.score_func == "softmax" and not moe.has_expert_bias and not moe.norm_topk_prob,
        "the router of DeepSeek V2 takes the best by softmax, without a bias or norm_topk_prob",
    )
    require(not grouped or moe.group_score == "max", "DeepSeek V2 has group_score = 'max'")
    return data | {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "scoring_func": "softmax",
        **_write_groups(moe),
        **_write_balance(moe),
    }


def write_v3(cfg: ModelConfig) -> dict[str, Any]:
    """The reverse of :func:`read_v3`; ``ValueError``: V3 has no such part.

    A model without experts is one whose first MoE layer would come after the last.
    """
    moe, data = _write(cfg)
    require(
        cfg.mtp is None or cfg.mtp.post_norm_hidden,
        "DeepSeek V3 feeds MTP the state after the norm: mtp.post_norm_hidden cannot be false",
    )
    data |= {
        "num_nextn_predict_layers": 0 if cfg.mtp is None else cfg.mtp.n_mtp_modules,
        "rope_interleave": True,
    }
    if moe is None:
        return data
    require(moe.score_func == "sigmoid", "the router of DeepSeek V3 has score_func = 'sigmoid'")
    top2 = moe.group_score == "top2" or moe.n_expert_groups == 1
    require(top2, "DeepSeek V3 has group_score = 'top2'")
    return data | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", **_write_groups(moe)}


def write_v32(cfg: ModelConfig) -> dict[str, Any]:
    """The reverse of :func:`read_v32`; ``ValueError``: V3.2 has no such part."""
    attention = cfg.groups[0].attention
    assert isinstance(attention, DSAConfig)
    require(attention.q_lora_rank is not None, "the indexer of DeepSeek V3.2 needs a q_lora_rank")
    require(
        not attention.index_warmup and not attention.index_shared,
        "in DeepSeek V3.2 every layer reads what its own indexer selects: index_warmup and "
        "index_shared must be false",
    )
    return write_v3(cfg) | {
        "index_n_heads": attention.index_n_heads,
        "index_head_dim": attention.index_head_dim,
        "index_topk": attention.index_topk,
    }


def _write(cfg: ModelConfig) -> tuple[MoEConfig | None, dict[str, Any]]:
    """The MoE of all layers that have one, and the keys that the three families share."""
    dense = [g.ffn for g in cfg.groups if isinstance(g.ffn, DenseConfig)]
    moes = [g.ffn for g in cfg.groups if isinstance(g.ffn, MoEConfig)]
    attention = cfg.groups[0].attention
    data = write_frame(cfg)
    if isinstance(attention, MLAConfig):
        data |= _write_mla(attention)
    else:
        assert isinstance(attention, MHAConfig)
        data |= write_mha(attention)
    if dense:
        require(not dense[0].bias, "an MLP of DeepSeek has no bias")
        data["intermediate_size"] = dense[0].inter_dim
    n_mtp = 0 if cfg.mtp is None else cfg.mtp.n_mtp_modules
    n_dense = sum(isinstance(g.ffn, DenseConfig) for g in cfg.layers())
    data["first_k_dense_replace"] = n_dense if moes else n_dense + n_mtp
    if not moes:
        return None, data
    moe = moes[0]
    data |= {
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.inter_dim,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.route_scale,
        "moe_layer_freq": 1,
        "ep_size": 1,
    }
    return moe, {"intermediate_size": moe.inter_dim, **data}


def _write_mla(cfg: MLAConfig) -> dict[str, Any]:
    require(type(cfg.position) is RopeConfig, "MLA in Hugging Face's files has plain RoPE")
    return {
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_heads,
        "q_lora_rank": cfg.q_lora_rank,
        "kv_lora_rank": cfg.kv_lora_rank,
        "qk_nope_head_dim": cfg.qk_nope_head_dim,
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "v_head_dim": cfg.v_head_dim,
        "attention_bias": cfg.bias,
        **write_position(cfg.position),
    }


def _write_groups(moe: MoEConfig) -> dict[str, int]:
    return {"n_group": moe.n_expert_groups, "topk_group": moe.n_limited_groups}


def _write_balance(moe: MoEConfig) -> dict[str, Any]:
    for item in moe.balance:
        if isinstance(item, SeqAuxLoss):
            return {"aux_loss_alpha": item.seq_aux_loss_coeff, "seq_aux": True}
        if isinstance(item, AuxLoss):
            return {"aux_loss_alpha": item.aux_loss_coeff, "seq_aux": False}
    return {"aux_loss_alpha": 0.0, "seq_aux": True}
