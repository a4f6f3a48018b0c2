"""What running or training a config needs, in bytes, on one device.

Weights and cache are exact. Training is an estimate by this rule:

* weights and gradients in float32 and AdamW's two moments: 16 bytes per parameter, MTP included;
* what the backward needs, in bf16 (2 bytes a number), per token and layer: what its two norms read
  and make (6 D), the heads' queries, keys, values and outputs, four inner vectors of a dense FFN
  and of shared experts, two (the pre-activations) of each routed one; no score matrix is kept;
* logits a chunk at a time (at most 1 GiB, as ``ops/cross_entropy.py`` makes them) and the head's
  gradient in float32, for each prediction depth.
"""

from typing import TypedDict

from fathom.config import LayerGroup, ModelConfig
from fathom.ffn import MoEConfig
from fathom.layers.cache import DTYPE_BYTES
from fathom.sizing.count import cache_bytes, num_mtp_params, num_params


class TrainingMemory(TypedDict):
    """Bytes of each part for one micro-batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int


class Memory(TypedDict):
    """Bytes: ``weights`` and ``cache`` in the cache's dtype, ``run`` their sum, ``train`` all of
    ``train_parts`` at a micro-batch of one sequence."""

    weights: int
    cache: int
    run: int
    train: int
    train_parts: TrainingMemory


def memory(cfg: ModelConfig, seq_len: int, dtype: str = "bfloat16") -> Memory:
    """To run and to train one sequence of ``seq_len``, weights and cache in ``dtype``."""
    weights = num_params(cfg) * DTYPE_BYTES[dtype]
    cache = cache_bytes(cfg, seq_len, dtype)
    parts = training_memory(cfg, seq_len)
    train = sum(parts[part] for part in TrainingMemory.__annotations__)
    return Memory(weights=weights, cache=cache, run=weights + cache, train=train, train_parts=parts)


def training_memory(cfg: ModelConfig, n_tokens: int) -> TrainingMemory:
    """To train with ``n_tokens`` in a micro-batch; the rule stands in the module's docstring."""
    params = num_params(cfg) + num_mtp_params(cfg)
    depths = 0 if cfg.mtp is None else cfg.mtp.n_mtp_modules
    layers = [*cfg.layers(), *[cfg.groups[-1]] * depths]
    kept = sum(_kept_per_token(group, cfg.dim) for group in layers)
    chunk = min(6 * cfg.vocab_size * n_tokens, 2**30)
    return TrainingMemory(
        weights=4 * params,
        gradients=4 * params,
        optimizer=8 * params,
        activations=2 * kept * n_tokens,
        loss=chunk + (1 + depths) * 4 * cfg.vocab_size * cfg.dim,
    )


def _kept_per_token(group: LayerGroup, dim: int) -> int:
    """Numbers that one layer keeps for the backward."""
    heads = group.attention.core_flops(1)  # 2 H (Q + V): as many as q, k, v and the output hold
    if isinstance(group.ffn, MoEConfig):  # of routed experts the pre-activations alone
        ffn = group.ffn.inter_dim * (4 * group.ffn.n_shared_experts + 2 * group.ffn.top_k)
    else:
        ffn = 4 * group.ffn.num_active_params(dim) // (3 * dim)  # gate, up and down share it
    return 6 * dim + heads + ffn
