"""Every Triton kernel once at small odd sizes, both ways, for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/ops/sanitize.py

memcheck finds reads and writes outside an allocation, racecheck races in shared memory, initcheck
reads of what nobody wrote, synccheck wrong barriers. Allocations must be real ones, which
PYTORCH_NO_CUDA_MEMORY_CACHING makes them.
"""

import os
from collections.abc import Callable
from importlib import import_module

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

from fathom.ops import (
    Impl,
    block_attention,
    index_loss,
    index_topk,
    range_attention,
    select_by_importance,
    select_by_mean,
    token_attention,
)
from fathom.ops.indexer import quantise_rows

LENGTH, HEADS, GROUPS, WIDTH = 83, 16, 2, 40
OURS: Impl = "triton"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)


def backward(out: Tensor) -> None:
    out.backward(torch.ones_like(out))


def places() -> Tensor:
    return torch.arange(LENGTH, device="cuda", dtype=torch.int32)[None]


def nsa() -> None:
    """16 query heads for two key heads: a query's blocks in turn."""
    q, k, v = (normal(1, LENGTH, n, WIDTH) for n in (HEADS, GROUPS, GROUPS))
    k_cmp, v_cmp = (normal(1, 10, GROUPS, WIDTH) for _ in "kv")
    place = places()
    low, high = place * 0, (place + 1) // 8
    starts = select_by_importance(
        q, k_cmp, low, high, place, place, scale=0.2, cmp_block_size=8, cmp_stride=8,
        block_size=16, topk_blocks=4, impl=OURS,
    )  # fmt: skip
    backward(block_attention(q, k, v, starts, place, block_size=16, scale=0.2, impl=OURS))
    backward(range_attention(q, k_cmp, v_cmp, low, high, scale=0.2, impl=OURS))
    backward(range_attention(q, k, v, (place - 19).clamp(min=0), place + 1, scale=0.2, impl=OURS))


def moba() -> None:
    """A key head for each query head: rows gathered by block."""
    q, k, v = (normal(1, LENGTH, GROUPS, WIDTH) for _ in range(3))
    means, place = k.detach()[:, :80].unflatten(1, (-1, 16)).mean(2), places()
    bounds = (place * 0, place // 16, place, place)
    starts = select_by_mean(q, means, *bounds, block_size=16, topk_blocks=3, impl=OURS)
    backward(block_attention(q, k, v, starts, place, block_size=16, scale=0.2, impl=OURS))


def dsa() -> None:
    q, k = normal(1, LENGTH, HEADS, 48), normal(1, LENGTH, 48)
    index_q, index_k = normal(1, LENGTH, 4, 32), normal(1, LENGTH, 32)
    weight = normal(1, LENGTH, 4, dtype=torch.float32)
    place = places()
    inputs = (index_q, index_k, weight, place, place * 0)
    selected = index_topk(*inputs, topk=9, impl=OURS)
    (q8, q_scale), (k8, k_scale) = quantise_rows(index_q), quantise_rows(index_k)
    eight = (q8, k8, weight * q_scale, place, place * 0)
    index_topk(*eight, topk=9, k_scale_BS=k_scale, impl=OURS)
    out, lse = token_attention(q, k, selected, value_dim=32, scale=0.2, impl=OURS)
    backward(out)
    main = (index_q, index_k, weight, q, k[:, :, None], place, place * 0)
    for known in (None, lse):
        backward(index_loss(*main, scale=0.2, selected_BTN=selected, main_lse_BTH=known, impl=OURS))


def checked() -> None:
    """Kernels that prove themselves: experts with their permutation, the router, the loss."""
    for name in ("experts", "router", "cross_entropy"):
        list(
            import_module(f"fathom.ops.{name}")._check(
                torch.device("cuda", torch.cuda.current_device())
            )
        )


def main() -> None:
    torch.manual_seed(0)
    runs: list[Callable[[], None]] = [nsa, moba, dsa, checked]
    for run in runs:
        run()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
