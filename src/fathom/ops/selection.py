"""Which blocks a query reads: scores and the best few in one op, for MoBA and NSA.

Both score *entries* that stand for several tokens: MoBA (arXiv:2502.13189, equation 5 to 6) the
mean of a block's keys, NSA (arXiv:2502.11089, equation 8 to 12) the keys of its compressed branch.
Scores of ``[T, E]`` never stand in memory for the whole length. The choice has no gradient.

Entries of a row stand in order, those of packed documents one after the other; a query sees entries
``[low, high)``, which are entries 0, 1, ... of its document. Blocks are counted from the start of
the document, key ``place - position``.

Shapes: B batch, T queries, E entries, H query heads, G key heads, R = H / G heads of a group, Q
query and key width, J blocks of a document, N = topk_blocks.
"""

import math

import torch
from torch import Tensor

from fathom.ops.chunks import by_queries, chunk_size
from fathom.ops.range_attention import in_range
from fathom.ops.registry import (
    Impl,
    Implementations,
    choose,
    kernel_refusal,
    op,
    shape_refusal,
    takes_all,
    wide,
)


def selection_kernel_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the Triton kernels need."""
    if reason := kernel_refusal(device, dtype, *tensors):
        return reason
    if not tensors:
        return ""
    q, k = tensors
    return shape_refusal(q.shape[2] // k.shape[2], q, k, k)


REFUSALS = {"triton": selection_kernel_refusal, "reference": takes_all}
SELECT_BY_MEAN = Implementations(op="select_by_mean", refusals=REFUSALS)
SELECT_BY_IMPORTANCE = Implementations(op="select_by_importance", refusals=REFUSALS)


@torch.no_grad()
def select_by_mean(
    q_BTHQ: Tensor,
    means_BEGQ: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    positions_BT: Tensor,
    places_BT: Tensor,
    *,
    block_size: int,
    topk_blocks: int,
    impl: Impl = "auto",
) -> Tensor:
    """MoBA: the current block and those whose mean key has the largest product with the query.

    Args:
        q_BTHQ: queries; each head selects on its own.
        means_BEGQ: mean key of each complete block; query head h reads ``h // (H / G)``.
        lows_BT: first entry of a query's document.
        highs_BT: ``low + position // block_size``: the blocks before the current one.
        positions_BT: place of the query in its document.
        places_BT: place of the query among the keys.
        block_size: tokens of a block.
        topk_blocks: blocks to select, the current one included.
        impl: which implementation.

    Returns:
        ``starts_BTHN``, int32: the first key of each block, the current block's first, then by
        score, ties to the earlier block; -1 where there are no more. As ``block_attention`` wants.
    """
    if choose(SELECT_BY_MEAN, impl, q_BTHQ, means_BEGQ) == "triton":
        counts = (lows_BT, highs_BT, positions_BT, places_BT)
        counted = [t.to(torch.int32).contiguous() for t in counts]
        tensors = [q_BTHQ.contiguous(), means_BEGQ, *counted]
        return _select_by_mean(tensors, block_size, topk_blocks)
    share = q_BTHQ.shape[2] // means_BEGQ.shape[2]
    means_BEHQ = means_BEGQ.repeat_interleave(share, dim=2).to(wide(means_BEGQ.dtype))
    n_entries = means_BEGQ.shape[1]

    def run(q: Tensor, lows: Tensor, highs: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        scores_BTHE = torch.einsum("bthq,behq->bthe", q.to(means_BEHQ.dtype), means_BEHQ)
        seen_BT1E = in_range(lows, highs, n_entries)[:, :, None]
        scores_BTHE = scores_BTHE.masked_fill(~seen_BT1E, float("-inf"))
        entries = best(scores_BTHE, topk_blocks - 1)  # of the row; in the document: minus low
        begin = (places - positions)[:, :, None, None]
        starts = begin + (entries - lows[:, :, None, None]) * block_size
        starts = starts.masked_fill(entries < 0, -1)
        current = begin + positions[:, :, None, None] // block_size * block_size
        current = current.expand(-1, -1, q.shape[2], -1)
        return torch.cat([current, starts], dim=-1).to(torch.int32)

    size = chunk_size(q_BTHQ.shape[0] * q_BTHQ.shape[2] * n_entries)
    return by_queries(run, size, q_BTHQ, lows_BT, highs_BT, positions_BT, places_BT)


@torch.no_grad()
def select_by_importance(
    q_BTHQ: Tensor,
    k_BEGQ: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    positions_BT: Tensor,
    places_BT: Tensor,
    *,
    scale: float,
    cmp_block_size: int,
    cmp_stride: int,
    block_size: int,
    topk_blocks: int,
    n_initial: int = 1,
    n_local: int = 2,
    lse_BTH: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """NSA: the forced blocks, then those on which the compressed branch puts most weight.

    ``importance[j] = sum over the group's heads and entries i of softmax_i(scale q k_i) *
    overlap(i, j)``, overlap being the tokens that entry i (document tokens ``[i * cmp_stride, i *
    cmp_stride + cmp_block_size)``) and block j share, over ``cmp_stride``.

    Args:
        q_BTHQ: queries; the heads of a group select together.
        k_BEGQ: compressed keys.
        lows_BT: first entry of a query's document.
        highs_BT: first entry that is not complete at the query's place.
        positions_BT: place of the query in its document.
        places_BT: place of the query among the keys.
        scale: of the compressed branch's scores.
        cmp_block_size: tokens of an entry.
        cmp_stride: tokens between the first tokens of two entries.
        block_size: tokens of a block.
        topk_blocks: blocks to select, the forced ones included.
        n_initial: the first blocks of the document are forced ...
        n_local: ... and so are the newest, the current one included.
        lse_BTH: log-sum-exp in base 2 of the compressed branch's scores, if it is known (from
            ``range_attention_with_sums``): saves the kernel a pass.
        impl: which implementation.

    Returns:
        ``starts_BTGN``, int32: the first key of each block, forced ones first, then by importance,
        ties to the earlier block; -1 where there are no more. As ``block_attention`` wants.

    Raises:
        ValueError: ``topk_blocks`` does not hold the forced blocks, or ``cmp_stride`` does not
            divide the two block sizes.
    """
    if topk_blocks < n_initial + n_local:
        raise ValueError(
            f"topk_blocks must hold the {n_initial} initial and {n_local} local blocks, "
            f"got {topk_blocks}"
        )
    if cmp_block_size % cmp_stride or block_size % cmp_stride:
        raise ValueError(
            f"cmp_stride must divide cmp_block_size and block_size, got {cmp_stride}, "
            f"{cmp_block_size} and {block_size}"
        )
    if choose(SELECT_BY_IMPORTANCE, impl, q_BTHQ, k_BEGQ) == "triton":
        counts = (lows_BT, highs_BT, positions_BT, places_BT)
        sums = [] if lse_BTH is None else [lse_BTH]
        counted = [t.to(torch.int32).contiguous() for t in counts]
        tensors = [q_BTHQ.contiguous(), k_BEGQ, *counted, *sums]
        blocks = [cmp_block_size, cmp_stride, block_size, topk_blocks, n_initial, n_local]
        return _select_by_importance(tensors, scale, blocks)
    k_BEGQ = k_BEGQ.to(wide(k_BEGQ.dtype))
    n_entries, groups = k_BEGQ.shape[1:3]
    n_blocks = -(-(n_entries * cmp_stride + cmp_block_size) // block_size)
    blocks_J = torch.arange(n_blocks, device=q_BTHQ.device)

    def run(q: Tensor, lows: Tensor, highs: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        scores_BTHE = scale * torch.einsum(
            "btgrq,begq->btgre", q.unflatten(2, (groups, -1)).to(k_BEGQ.dtype), k_BEGQ
        ).flatten(2, 3)
        seen_BT1E = in_range(lows, highs, n_entries)[:, :, None]
        weights_BTHE = scores_BTHE.masked_fill(~seen_BT1E, float("-inf")).softmax(-1)
        weights_BTGE = weights_BTHE.nan_to_num(0.0).unflatten(2, (groups, -1)).sum(3)
        scores_BTGJ = spread(weights_BTGE, lows, blocks_J, cmp_block_size, cmp_stride, block_size)
        current = positions[:, :, None, None] // block_size
        forced = (blocks_J < n_initial) | (blocks_J > current - n_local)
        scores_BTGJ = scores_BTGJ.masked_fill(forced, float("inf"))
        chosen = best(scores_BTGJ.masked_fill(blocks_J > current, float("-inf")), topk_blocks)
        starts = (places - positions)[:, :, None, None] + chosen * block_size
        return starts.masked_fill(chosen < 0, -1).to(torch.int32)

    size = chunk_size(q_BTHQ.shape[0] * q_BTHQ.shape[2] * n_entries)
    return by_queries(run, size, q_BTHQ, lows_BT, highs_BT, positions_BT, places_BT)


def spread(
    weights_BTGE: Tensor,
    lows_BT: Tensor,
    blocks_J: Tensor,
    cmp_block_size: int,
    cmp_stride: int,
    block_size: int,
) -> Tensor:
    """Weights of entries as weights of the blocks that they overlap, ``[B, T, G, J]``.

    Block j overlaps entries ``j * block / stride - (cmp_block / stride - 1)`` to ``(j + 1) * block
    / stride - 1`` of its document: for blocks of 64, entries of 32 and a stride of 16 by 1, 2, 2,
    2, 1 strides.
    """
    before, length = cmp_block_size // cmp_stride, block_size // cmp_stride
    steps = torch.arange(1 - before, length, device=blocks_J.device)
    shared = torch.minimum(steps + before, length - steps).clamp(max=min(before, length))
    entries_JM = blocks_J[:, None] * length + steps
    entries_BTJM = entries_JM + lows_BT[..., None, None]
    n_entries = weights_BTGE.shape[-1]
    inside = (entries_JM >= 0) & (entries_BTJM < n_entries)  # the weight of what is not seen is 0
    index = entries_BTJM.masked_fill(~inside, 0).flatten(2)[:, :, None]
    if n_entries == 0:
        return weights_BTGE.new_zeros(*weights_BTGE.shape[:3], len(blocks_J))
    index = index.expand(-1, -1, weights_BTGE.shape[2], -1)
    gathered_BTGJM = weights_BTGE.gather(-1, index).unflatten(-1, entries_JM.shape)
    return (gathered_BTGJM * (inside * shared)[:, :, None]).sum(-1)


def best(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of the last dim stand, ties to the lowest; -1 for ``-inf``."""
    order = scores.sort(dim=-1, descending=True, stable=True)
    chosen = order.indices.masked_fill(order.values == float("-inf"), -1)[..., :count]
    missing = count - chosen.shape[-1]
    return torch.nn.functional.pad(chosen, (0, missing), value=-1)


@op(
    "select_by_mean",
    fake=lambda tensors, block_size, topk_blocks: tensors[0].new_empty(
        *tensors[0].shape[:3], topk_blocks, dtype=torch.int32
    ),
    flops=lambda tensors, *_: 2 * math.prod(tensors[0]) * tensors[1][1],
)
def _select_by_mean(tensors: list[Tensor], block_size: int, topk_blocks: int) -> Tensor:
    """FLOPs are counted as if every query saw every entry: bounds are data."""
    from fathom.ops.triton import selection as kernels

    q, means, lows, highs, positions, places = tensors
    return kernels.select_by_mean(q, means, lows, highs, positions, places, block_size, topk_blocks)


@op(
    "select_by_importance",
    fake=lambda tensors, scale, blocks: tensors[0].new_empty(
        *tensors[0].shape[:2], tensors[1].shape[2], blocks[3], dtype=torch.int32
    ),
    flops=lambda tensors, *_: (
        (2 if len(tensors) > 6 else 4) * math.prod(tensors[0]) * tensors[1][1]
    ),
)
def _select_by_importance(tensors: list[Tensor], scale: float, blocks: list[int]) -> Tensor:
    """``blocks``: the sizes and counts of ``select_by_importance``, in the order of its arguments.

    Without the sums of exponentials, scores are computed twice. FLOPs as if every query saw every
    entry.
    """
    from fathom.ops.triton import selection as kernels

    q, k, lows, highs, positions, places, *sums = tensors
    lse = sums[0] if sums else None
    return kernels.select_by_importance(q, k, lows, highs, positions, places, lse, scale, *blocks)
