"""torchtitan as a peer of a training step on one GPU: the same model, built from our config.

It needs the folders of the wheels torchtitan 0.3.0 and spmd_types 0.2.3 on ``PYTHONPATH``; nothing
else of what torchtitan depends on. It runs as it does itself, every block compiled whole, except:

- attention by ``sdpa`` (cuDNN's kernel) too, which 0.3.0 refuses for language models because it
  knows no documents, though it is the faster choice for rows of one document; ``flex`` is its own;
- without positions, which its trainer passes and RoPE then gathers by: in its favour;
- no mesh: what its SPMD checker does on one device is nothing, said so to torch 2.11's compiler.
"""

import contextlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from fathom.attention import MHAConfig, MLAConfig
from fathom.config import ModelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.layers.position import RopeConfig

Attention = Literal["sdpa", "flex"]


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torchtitan", "spmd_types"))


def build(
    cfg: ModelConfig, length: int, *, attention: Attention, device: str, backend: str = "inductor"
) -> nn.Module:
    """A model of ``cfg``'s shape in bfloat16, compiled by block for rows of ``length`` tokens."""
    _stand_in()
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.compile import apply_compile

    shape = _deepseek(cfg, length) if len(cfg.groups) > 1 else _llama(cfg, length)
    if attention == "sdpa":
        from torchtitan.models.common.attention import ScaledDotProductAttention

        for layer in shape.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device("meta"):
        model = shape.build()
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_states(buffer_device=torch.device(device))
    for weight in model.parameters():  # not the buffers: RoPE's are complex
        weight.data = weight.data.to(torch.bfloat16)
    compiling = CompileConfig(enable=True, backend=backend)
    apply_compile(model, compile_config=compiling, parallel_dims=SimpleNamespace(tp_enabled=False))
    return model


def causal(attention: Attention, length: int, device: str) -> Any:
    """What its forward wants as ``attention_masks`` for rows of one document each."""
    if attention == "sdpa":
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """As in its ``CrossEntropyLoss``; to be compiled. Its loss in chunks was slower."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _stand_in() -> None:
    """Put stand-ins where torchtitan imports what it does not use on this path."""
    try:
        import tyro  # noqa: F401
    except ImportError:  # it reads command lines
        sys.modules["tyro"] = MagicMock()
    import torch.distributed.fsdp as fsdp

    if not hasattr(fsdp, "DataParallelMeshDims"):  # newer than torch 2.11
        fsdp.DataParallelMeshDims = object
    if not hasattr(torch.compiler, "_is_non_strict_tracing"):
        torch.compiler._is_non_strict_tracing = lambda: False
    import spmd_types
    import spmd_types._state
    import spmd_types.runtime
    import torchtitan.models.deepseek_v3
    import torchtitan.models.llama3  # noqa: F401
    from torchtitan.models.common import moe, rope

    spmd_types.local = spmd_types.no_typecheck = contextlib.nullcontext
    moe.maybe_set_sparse_mesh = contextlib.nullcontext
    for module in (spmd_types, spmd_types._state, spmd_types.runtime):
        module.is_type_checking = lambda: False
    spmd_types.local_map = lambda **_: lambda function: function
    plain = rope._reshape_for_broadcast
    rope._reshape_for_broadcast = getattr(plain, "__wrapped__", plain)


def _whole(model: Any, package: Any, cfg: ModelConfig, layers: list[Any], **more: Any) -> Any:
    from torchtitan.models.common import Embedding, Linear, RMSNorm

    return model.Config(
        vocab_size=cfg.vocab_size,
        dim=cfg.dim,
        tok_embeddings=Embedding.Config(
            num_embeddings=cfg.vocab_size,
            embedding_dim=cfg.dim,
            param_init=package._EMBEDDING_SKIP_INIT
            if cfg.tie_embeddings
            else package._EMBEDDING_INIT,
        ),
        norm=RMSNorm.Config(normalized_shape=cfg.dim, param_init=package._NORM_INIT),
        lm_head=Linear.Config(
            in_features=cfg.dim,
            out_features=cfg.vocab_size,
            param_init=package._output_linear_init(cfg.dim),
        ),
        layers=layers,
        enable_weight_tying=cfg.tie_embeddings,
        **more,
    )


def _rope(width: int, length: int, position: object) -> Any:
    from torchtitan.models.common import ComplexRoPE

    assert isinstance(position, RopeConfig)  # its scaling changes a table, not the work
    return ComplexRoPE.Config(dim=width, max_seq_len=length, theta=position.theta, scaling="none")


def _llama(cfg: ModelConfig, length: int) -> Any:
    from torchtitan.models import llama3

    (group,) = cfg.groups
    attention, ffn = group.attention, group.ffn
    assert isinstance(attention, MHAConfig)
    assert isinstance(ffn, DenseConfig)
    assert attention.head_dim * attention.n_heads == cfg.dim
    layers = llama3._build_llama3_layers(
        n_layers=group.count,
        dim=cfg.dim,
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        hidden_dim=ffn.inter_dim,
        rope=_rope(attention.head_dim, length, attention.position),
        attn_backend="flex",
    )
    return _whole(llama3.Llama3Model, llama3, cfg, layers)


def _deepseek(cfg: ModelConfig, length: int) -> Any:
    from torchtitan.models import deepseek_v3

    first, last = cfg.groups
    attention, ffn, moe = last.attention, first.ffn, last.ffn
    assert isinstance(attention, MLAConfig)
    assert isinstance(ffn, DenseConfig)
    assert isinstance(moe, MoEConfig)
    assert moe.score_func in ("sigmoid", "softmax")
    assert moe.n_expert_groups == 1
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=cfg.n_layers,
        n_dense_layers=first.count,
        dim=cfg.dim,
        n_heads=attention.n_heads,
        q_lora_rank=attention.q_lora_rank or 0,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=ffn.inter_dim,
        moe_hidden_dim=moe.inter_dim,
        num_experts=moe.n_routed_experts,
        num_shared_experts=moe.n_shared_experts,
        router_top_k=moe.top_k,
        router_score_func=moe.score_func,
        router_route_norm=moe.norm_topk_prob,
        router_route_scale=moe.route_scale,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=_rope(attention.qk_rope_head_dim, length, attention.position),
    )
    return _whole(deepseek_v3.DeepSeekV3Model, deepseek_v3, cfg, layers, mtp_layers=[])
