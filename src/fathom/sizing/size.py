"""``size``: everything a config says about its cost, as one table."""

from typing import TypedDict

from fathom.config import ModelConfig, ParallelConfig
from fathom.layers.base import require
from fathom.layers.cache import DTYPE_BYTES
from fathom.sizing import count
from fathom.sizing.memory import Memory, memory
from fathom.sizing.parallel import ParallelSize, parallel_size
from fathom.sizing.reach import Reach, reach


class Size(TypedDict):
    """What ``size`` returns: parameters, forward FLOPs, bytes, lengths in tokens."""

    params: int
    active_params: int
    mtp_params: int
    layers: int
    seq_len: int
    flops_per_token: int
    flops_per_token_causal: float
    cache_dtype: str
    cache_bytes_per_token: int
    cache_bytes: int
    rope: Reach | None
    memory: Memory
    parallel: ParallelSize | None


def size(
    model: ModelConfig,
    *,
    seq_len: int | None = None,
    cache_dtype: str = "bfloat16",
    parallel: ParallelConfig | None = None,
) -> Size:
    """Parameters, FLOPs, cache and memory of a model, from its config alone.

    Args:
        model: the config.
        seq_len: context for FLOPs, cache, memory and the scaled reach; None: ``max_seq_len``.
        cache_dtype: of cache and weights when running.
        parallel: a layout to train in, with one sequence per rank and step; None: say nothing.

    Raises:
        ValueError: ``seq_len`` below 1, an unknown ``cache_dtype``, or experts that cannot be
            spread like that.
    """
    seq_len = model.max_seq_len if seq_len is None else seq_len
    require(seq_len >= 1, f"seq_len must be at least 1, got {seq_len}")
    require(
        cache_dtype in DTYPE_BYTES,
        f"cache_dtype must be one of {', '.join(DTYPE_BYTES)}, got {cache_dtype!r}",
    )
    return Size(
        params=count.num_params(model),
        active_params=count.num_active_params(model),
        mtp_params=count.num_mtp_params(model),
        layers=model.n_layers,
        seq_len=seq_len,
        flops_per_token=count.flops_per_token(model, seq_len),
        flops_per_token_causal=count.mean_causal_flops_per_token(model, seq_len),
        cache_dtype=cache_dtype,
        cache_bytes_per_token=count.cache_bytes_per_token(model, cache_dtype),
        cache_bytes=count.cache_bytes(model, seq_len, cache_dtype),
        rope=reach(model, seq_len),
        memory=memory(model, seq_len, cache_dtype),
        parallel=parallel and parallel_size(model, parallel, n_tokens=seq_len),
    )
