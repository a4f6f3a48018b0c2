"""Long sequences a chunk of queries at a time, so that no score matrix lives for the whole length.

Rematerialisation (arXiv:1604.06174): the backward computes a chunk again instead of keeping it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_NUMBERS = 1 << 24  # numbers that the widest tensor of a chunk may hold


def chunk_size(numbers_per_query: int) -> int:
    """How many queries go together if each needs so many numbers."""
    return max(CHUNK_NUMBERS // max(numbers_per_query, 1), 1)


def spans(n_queries: int, numbers_per_query: int) -> Iterator[slice]:
    """The queries of each chunk."""
    size = chunk_size(numbers_per_query)
    return (slice(a, min(a + size, n_queries)) for a in range(0, n_queries, size))


def by_queries(run: Callable[..., Tensor], size: int, *tensors_BT: Tensor) -> Tensor:
    """``run`` over ``size`` queries (dim 1 of every tensor) at a time, joined along dim 1.

    Where several chunks want gradients, each is computed again in the backward.
    """
    if tensors_BT[0].shape[1] <= size:
        return run(*tensors_BT)
    chunks = zip(*(t.split(size, dim=1) for t in tensors_BT), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([run(*chunk) for chunk in chunks], dim=1)
    return torch.cat([checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks], dim=1)
