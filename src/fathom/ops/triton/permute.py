"""Kernels of ``ops/permute.py``: a counting sort by expert, and the gathers there and back.

The sort is three launches and never asks how many rows an expert got. Tiles of pairs are counted by
expert; an exclusive scan over (expert, tile) gives where a tile's rows of an expert begin; in its
tile a pair comes after the earlier ones of its expert. Counts are integers and every place is
written once, so nothing depends on the order in which programs run.

Shapes: N tokens, K experts per token, P = N * K pairs or rows in expert order, E experts, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SORT_BLOCK = 256  # pairs of a tile


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _count(ids_P, counts_ET, pairs, experts, tiles, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    tile = tl.program_id(0)
    pair = tile * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_P + pair, mask=pair < pairs, other=-1).to(tl.int32)
    for first in range(0, experts, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[:, None] == ids[None, :]).to(tl.int32), axis=1)
        tl.store(counts_ET + expert * tiles + tile, count, mask=expert < experts)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _place(
    ids_P,
    counts_ET,
    ends_ET,
    order_P,
    inverse_P,
    ends_E,
    counts_E,
    pairs,
    experts,
    tiles,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile = tl.program_id(0)
    pair = tile * BLOCK + tl.arange(0, BLOCK)
    real = pair < pairs
    ids = tl.load(ids_P + pair, mask=real, other=-1).to(tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, PART):
        other = tile * BLOCK + first + tl.arange(0, PART)
        ids_other = tl.load(ids_P + other, mask=other < pairs, other=-2).to(tl.int32)
        before = (ids[:, None] == ids_other[None, :]) & (other[None, :] < pair[:, None])
        rank += tl.sum(before.to(tl.int32), axis=1)
    at = ids * tiles + tile
    end = tl.load(ends_ET + at, mask=real, other=0)
    row = end - tl.load(counts_ET + at, mask=real, other=0) + rank
    tl.store(order_P + row, pair.to(tl.int64), mask=real)
    tl.store(inverse_P + pair, row.to(tl.int64), mask=real)
    if tile == 0:
        for first in range(0, experts, BLOCK_E):
            expert = first + tl.arange(0, BLOCK_E)
            here = expert < experts
            end_e = tl.load(ends_ET + (expert + 1) * tiles - 1, mask=here, other=0)
            start = tl.load(ends_ET + expert * tiles - 1, mask=here & (expert > 0), other=0)
            tl.store(ends_E + expert, end_e, mask=here)
            tl.store(counts_E + expert, (end_e - start).to(tl.int64), mask=here)


def sort_by_expert(ids_P: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(order, inverse, ends, counts)`` of flat expert ids; see ``ops.permute.Permutation``."""
    ids_P, pairs = ids_P.contiguous(), ids_P.shape[0]
    tiles = triton.cdiv(pairs, SORT_BLOCK)
    order, inverse = (ids_P.new_empty(pairs, dtype=torch.int64) for _ in range(2))
    if not pairs:
        zeros = ids_P.new_zeros(n_experts, dtype=torch.int64)
        return order, inverse, zeros.to(torch.int32), zeros
    ends = ids_P.new_empty(n_experts, dtype=torch.int32)
    counts = ids_P.new_empty(n_experts, dtype=torch.int64)
    counts_ET = ids_P.new_empty(n_experts * tiles, dtype=torch.int32)
    block_e = min(32, triton.next_power_of_2(n_experts))
    sizes = (pairs, n_experts, tiles)
    _count[(tiles,)](ids_P, counts_ET, *sizes, BLOCK=SORT_BLOCK, BLOCK_E=block_e)
    ends_ET = counts_ET.cumsum(0, dtype=torch.int32)
    _place[(tiles,)](
        ids_P,
        counts_ET,
        ends_ET,
        order,
        inverse,
        ends,
        counts,
        *sizes,
        BLOCK=SORT_BLOCK,
        PART=32,
        BLOCK_E=block_e,
        num_warps=8,
    )
    return order, inverse, ends, counts


@triton.jit(do_not_specialize=["rows"])
def _gather(x_ND, rows_PD, inverse_P, rows, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ND + token * width + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse_P + token * TOP_K + k)
        end = tl.where(row < rows, width, 0)
        tl.store(rows_PD + row * width + column, x, mask=column < end)


@triton.jit(do_not_specialize=["rows"])
def _gather_sum(y_PD, out_ND, rows_NK, rows, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows_NK + token * TOP_K + k)
        end = tl.where(row < rows, width, 0)
        y = tl.load(y_PD + row * width + column, mask=column < end, other=0.0)
        total += y.to(tl.float32)
    tl.store(out_ND + token * width + column, total.to(out_ND.dtype.element_ty), mask=inside)


def column_block(width: int) -> int:
    """Columns of a program: 16 bytes for each of 128 threads, fewer if the row is short."""
    return min(1024, triton.next_power_of_2(width))


def gather_rows(x_ND: Tensor, order_P: Tensor, inverse_P: Tensor, top_k: int) -> Tensor:
    """Each token's row at its ``top_k`` places in expert order; a row is read once."""
    (tokens, width), rows = x_ND.shape, order_P.shape[0]
    rows_PD = x_ND.new_empty(rows, width)
    block = column_block(width)
    if rows_PD.numel():
        grid = (tokens, triton.cdiv(width, block))
        tensors = (x_ND.contiguous(), rows_PD, inverse_P)
        _gather[grid](*tensors, rows, width, TOP_K=top_k, BLOCK=block)
    return rows_PD


def gather_sum(y_PD: Tensor, rows_NK: Tensor) -> Tensor:
    """``out[n] = sum_k y[rows[n, k]]``, added in float32 in the order of k.

    Args:
        y_PD: contiguous.
        rows_NK: contiguous; a row that y does not have counts as zeros.
    """
    (tokens, top_k), (rows, width) = rows_NK.shape, y_PD.shape
    out_ND = y_PD.new_empty(tokens, width)
    block = column_block(width)
    if out_ND.numel():
        grid = (tokens, triton.cdiv(width, block))
        _gather_sum[grid](y_PD, out_ND, rows_NK, rows, width, TOP_K=top_k, BLOCK=block)
    return out_ND
