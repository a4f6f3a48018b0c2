"""Scores and the best few blocks in one kernel: no score leaves the chip.

A tile of queries walks over the entries and keeps its best blocks so far, as 64-bit keys: the bits
of a score in an order of integers, then the complement of the block's number. A larger key is a
better score, or the earlier block of two equal ones, so any way of sorting gives the same choice.

Shapes: B batch, T queries, E entries, H query heads, G key heads, R = H / G, Q width, J blocks of a
tile, N blocks to select. Capital kernel arguments are constants; those ending in P are padded to a
power of two.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's annotations ask for a constexpr where it takes any number.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.triton.softmax import (
    LOG2_E,
    Tile,
    group_sizes,
    key_rows,
    load_rows,
    online_softmax,
)

BY_MEAN = Tile(64, 64, 4, 2)  # its keys are the entries
BY_IMPORTANCE = Tile(64, 64, 4, 3)
LARGE = Tile(64, 64, 8, 2)  # float32
KEPT = 512  # blocks whose importance is kept before the best of them are merged


@triton.jit
def _keys(scores, numbers):
    """Float32 scores and numbers below 2**31 as keys; the least of all keys stands for nothing."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - numbers).to(tl.int64)


@triton.jit
def _nothing():
    return tl.full([], -0x8000000000000000, tl.int64)


@triton.jit
def _best(best, keys, rows: tl.constexpr, NP: tl.constexpr, WIDTH: tl.constexpr):
    """The NP largest of each row of both, largest first."""
    if WIDTH > NP:
        keys = tl.topk(keys, NP)
    return tl.topk(tl.join(best, keys).reshape(rows, 2 * NP), NP)


@triton.jit
def _by_mean(
    q, means, lows, highs, positions, places, starts, T, E, room,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each row of a tile (a query and one of its heads) selects on its own."""
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    x = tl.arange(0, ROWS)
    t, r = tl.program_id(0) * (ROWS // RP) + x // RP, x % RP
    there = (t < T) & (r < R)
    bt = b * T + tl.minimum(t, T - 1)
    row = bt * H + g * R + tl.minimum(r, R - 1)
    q_XQ = load_rows(q, row, Q, QP)
    low, high = tl.load(lows + bt), tl.load(highs + bt)
    head = b.to(tl.int64) * room * G + g
    some = there & (low < high)
    first, last = tl.min(tl.where(some, low, E)), tl.max(tl.where(some, high, 0))
    best = tl.full([ROWS, NP], 0, tl.int64) + _nothing()
    for start in range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        means_EQ = load_rows(means, head + tl.minimum(entries, last - 1) * G, Q, QP)
        scores = tl.dot(q_XQ, tl.trans(means_EQ), input_precision="ieee")
        seen = (entries[None, :] >= low[:, None]) & (entries[None, :] < high[:, None])
        keys = tl.where(seen, _keys(scores, entries[None, :]), _nothing())
        best = _best(best, keys, ROWS, NP, ENTRIES)
    n = tl.arange(0, NP)
    position = tl.load(positions + bt)
    begin = tl.load(places + bt) - position
    entry = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    chosen = begin[:, None] + (entry - low[:, None]) * BLOCK
    chosen = tl.where(best == _nothing(), -1, chosen)
    to = starts + row.to(tl.int64) * N
    tl.store(to, begin + position // BLOCK * BLOCK, mask=there)
    tl.store(to[:, None] + 1 + n, chosen, mask=there[:, None] & (n < N - 1))


@triton.jit
def _log_sum(q_XQ, k, head, low, high, first, last, scale, G: tl.constexpr, Q: tl.constexpr,
             QP: tl.constexpr, ENTRIES: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Log2 of the sum of exponentials of each row's scores; ``+inf`` where there are none."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        k_EQ = load_rows(k, head + tl.minimum(entries, last - 1) * G, Q, QP)
        scores = tl.dot(q_XQ, tl.trans(k_EQ), input_precision="ieee") * scale
        seen = (entries[None, :] >= low[:, None]) & (entries[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        _, top, total, _ = online_softmax(scores, top, total)
    return tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))


@triton.jit
def _by_importance(
    q, k, lows, highs, positions, places, lse, starts, T, E, room, scale, KNOWN: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr,
    BEFORE: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    ENTRIES: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of a query (its heads) add up and select together. KNOWN: ``lse`` is.

    Block j overlaps the document's entries ``j * LENGTH - (BEFORE - 1)`` to ``(j + 1) * LENGTH -
    1``; a tile of J blocks reads all entries that they overlap. Blocks are counted from the start
    of a document, so each document of a tile of queries is walked on its own. Sorting is what
    takes time, so the importance of TILES tiles is kept before it is merged with the best so far.
    """
    QUERIES: tl.constexpr = ROWS // RP
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    x = tl.arange(0, ROWS)
    t, r = tile + x // RP, x % RP
    there = (t < T) & (r < R)
    bt = b * T + tl.minimum(t, T - 1)
    row = bt * H + g * R + tl.minimum(r, R - 1)
    q_XQ = load_rows(q, row, Q, QP)
    low, high = tl.load(lows + bt), tl.load(highs + bt)
    high = tl.where(there, high, low)
    head = b.to(tl.int64) * room * G + g
    if KNOWN:
        log_sum = tl.load(lse + row)
    else:
        some = low < high
        first, last = tl.min(tl.where(some, low, E)), tl.max(tl.where(some, high, 0))
        log_sum = _log_sum(q_XQ, k, head, low, high, first, last, scale, G, Q, QP, ENTRIES, ROWS)

    query = b * T + tl.minimum(tile + tl.arange(0, QUERIES), T - 1)
    position, place = tl.load(positions + query), tl.load(places + query)
    low_of, current = tl.load(lows + query), position // BLOCK
    j, e, c = tl.arange(0, JP), tl.arange(0, ENTRIES), tl.arange(0, TILES * JP)
    slots = tl.arange(0, TILES)[None, :, None]
    step = e[:, None] - (BEFORE - 1) - j[None, :] * LENGTH
    shared = tl.minimum(tl.minimum(step + BEFORE, LENGTH - step), min(BEFORE, LENGTH))
    shared = tl.maximum(shared, 0).to(tl.float32)
    best = tl.full([QUERIES, NP], 0, tl.int64) + _nothing()
    document, newest = tl.min(low_of), tl.max(low_of)
    while document <= newest:
        blocks = tl.max(tl.where(low_of == document, current, -1)) + 1
        for base in range(0, blocks, TILES * J):
            kept = tl.zeros([QUERIES, TILES, JP], tl.float32)
            for slot in range(tl.minimum(tl.cdiv(blocks - base, J), TILES)):
                inside = (base + slot * J) * LENGTH - (BEFORE - 1) + e
                entries = document + inside
                at = tl.maximum(tl.minimum(entries, E - 1), 0)
                k_EQ = load_rows(k, head + at * G, Q, QP)
                scores = tl.dot(q_XQ, tl.trans(k_EQ), input_precision="ieee") * scale
                seen = (inside >= 0)[None, :] & (entries[None, :] < high[:, None])
                seen &= (low == document)[:, None]
                weights = tl.where(seen, tl.exp2(scores - log_sum[:, None]), 0.0)
                weights = tl.sum(weights.reshape(QUERIES, RP, ENTRIES), 1)
                if (BEFORE == 1) & (LENGTH == 1):
                    importance = weights
                else:
                    importance = tl.sum(weights[:, :, None] * shared[None, :, :], 1)
                kept = tl.where(slots == slot, importance[:, None, :], kept)
            block = (base + c // JP * J + c % JP)[None, :]
            forced = (block < INITIAL) | (block > current[:, None] - LOCAL)
            kept = tl.where(forced, float("inf"), kept.reshape(QUERIES, TILES * JP))
            real = (block <= current[:, None]) & (low_of == document)[:, None]
            keys = tl.where(real & (c % JP < J)[None, :], _keys(kept, block), _nothing())
            best = _best(best, keys, QUERIES, NP, TILES * JP)
        document = tl.min(tl.where(low_of > document, low_of, 2147483647))
        document = tl.where(document == 2147483647, newest + 1, document)
    n = tl.arange(0, NP)
    block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    chosen = tl.where(best == _nothing(), -1, (place - position)[:, None] + block * BLOCK)
    to = starts + (query.to(tl.int64) * G + g) * N
    mask = (tile + tl.arange(0, QUERIES) < T)[:, None] & (n < N)
    tl.store(to[:, None] + n, chosen, mask=mask)


def select_by_mean(
    q: Tensor, means: Tensor, lows: Tensor, highs: Tensor, positions: Tensor, places: Tensor,
    block_size: int, topk_blocks: int,
) -> Tensor:  # fmt: skip
    """``starts_BTHN``. Tensors are contiguous (of the means each batch row), counts are int32."""
    fixed, (room, (means,)) = group_sizes(q, means), key_rows(means)
    starts = q.new_empty(*q.shape[:3], topk_blocks, dtype=torch.int32)
    kept = triton.next_power_of_2(max(topk_blocks - 1, 1))
    rows = max(BY_MEAN.rows, fixed["RP"])
    grid = (triton.cdiv(q.shape[1], rows // fixed["RP"]), q.shape[0] * means.shape[2])
    _by_mean[grid](
        q, means, lows, highs, positions, places, starts, q.shape[1], means.shape[1], room,
        **fixed, N=topk_blocks, NP=kept, BLOCK=block_size, ENTRIES=max(BY_MEAN.keys, kept),
        ROWS=rows, num_warps=BY_MEAN.warps, num_stages=BY_MEAN.stages,
    )  # fmt: skip
    return starts


def select_by_importance(
    q: Tensor, k: Tensor, lows: Tensor, highs: Tensor, positions: Tensor, places: Tensor,
    lse: Tensor | None, scale: float, cmp_block_size: int, cmp_stride: int, block_size: int,
    topk_blocks: int, n_initial: int, n_local: int,
) -> Tensor:  # fmt: skip
    """``starts_BTGN``. Tensors are contiguous (of the keys each batch row), counts are int32."""
    fixed, (room, (k,)) = group_sizes(q, k), key_rows(k)
    starts = q.new_empty(*q.shape[:2], k.shape[2], topk_blocks, dtype=torch.int32)
    before, length = cmp_block_size // cmp_stride, block_size // cmp_stride
    kept = triton.next_power_of_2(topk_blocks)
    cut = BY_IMPORTANCE if q.itemsize == 2 else LARGE
    entries = max(cut.keys, triton.next_power_of_2(length + before - 1))
    blocks = (entries - before + 1) // length
    width = max(triton.next_power_of_2(blocks), kept)
    all_tiles = triton.cdiv(triton.cdiv(k.shape[1], length) + 1, blocks)
    tiles = min(triton.next_power_of_2(all_tiles), max(KEPT // width, 1))
    rows = max(cut.rows, fixed["RP"])
    grid = (triton.cdiv(q.shape[1], rows // fixed["RP"]), q.shape[0] * k.shape[2])
    _by_importance[grid](
        q, k, lows, highs, positions, places, starts if lse is None else lse, starts,
        q.shape[1], k.shape[1], room, scale * LOG2_E, lse is not None,
        **fixed, N=topk_blocks, NP=kept, BLOCK=block_size, BEFORE=before, LENGTH=length,
        INITIAL=n_initial, LOCAL=n_local, ENTRIES=entries, J=blocks, JP=width, TILES=tiles,
        ROWS=rows, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return starts
