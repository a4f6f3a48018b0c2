"""DSA's lightning indexer on the device: scores of a chunk of queries, then the best of each row.

*Scores*: a program has a tile of queries and a tile of keys and goes through the index heads; one
head's ``q k^T`` is a matrix product, and its ReLU times the head's weight is added to the tile.
They lie in a workspace for a chunk of queries and never for the whole length.

*Selection*: a program has one query's row. Its scores are mapped to integers of the same order, and
the least of the best ``topk`` is found digit by digit, 8 bits at a time, from a histogram of those
that share the digits found so far. A last pass writes the indices that lie above it, and of those
equal to it the first, in the order of the keys: so ties go to the lowest index, and neighbouring
tokens lie together for what gathers them.

Queries and keys may be in E4M3: then their product is, and the factors of both come in afterwards.

Shapes: M queries of all rows, J index heads, W index width, WP padded to a power of two, S keys
of a row. Capital kernel arguments are constants.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations ask for a constexpr where it takes any number.)

import torch
import triton
import triton.language as tl
from torch import Tensor

WORKSPACE_BYTES = 2**28  # of the scores of a chunk of queries
SCORE_TILE = {"QUERIES": 128, "KEYS": 128, "num_warps": 8, "num_stages": 3}
SELECT_TILE = {"KEYS": 4096, "num_warps": 8, "num_stages": 2}


@triton.jit
def _scores(
    q,
    k,
    weight,
    k_scale,
    places,
    begins,
    scores,
    n_queries,
    n_keys,
    J: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    SCALED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """``scores [queries, n_keys]``, in tiles of which some query sees some key."""
    queries = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    there = queries < n_queries
    last = tl.max(tl.load(places + queries, mask=there, other=-1), axis=0)
    first = tl.min(tl.load(begins + queries, mask=there, other=n_keys), axis=0)
    if tl.program_id(0) * KEYS > last or tl.program_id(0) * KEYS + KEYS <= first:
        return
    columns = tl.arange(0, WP)
    inside = columns < W
    k_at = k + keys.to(tl.int64)[:, None] * W + columns[None, :]
    k_KW = tl.load(k_at, mask=(keys < n_keys)[:, None] & inside[None, :], other=0.0)
    acc = tl.zeros([QUERIES, KEYS], tl.float32)
    q_at = q + queries.to(tl.int64)[:, None] * (J * W) + columns[None, :]
    for head in tl.range(0, J):
        q_QW = tl.load(q_at + head * W, mask=there[:, None] & inside[None, :], other=0.0)
        w_Q = tl.load(weight + queries.to(tl.int64) * J + head, mask=there, other=0.0)
        z_QK = tl.dot(q_QW, tl.trans(k_KW), input_precision="ieee")
        acc += tl.maximum(z_QK, 0.0) * w_Q[:, None]
    if SCALED:
        acc *= tl.load(k_scale + keys, mask=keys < n_keys, other=0.0)[None, :]
    into = scores + queries.to(tl.int64)[:, None] * n_keys + keys[None, :]
    tl.store(into, acc, mask=there[:, None] & (keys < n_keys)[None, :])


@triton.jit
def _ordered(scores):
    """uint32 in the order of float32 scores, ``-0`` and ``0`` alike."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def _select(scores, places, begins, selected, n_keys, topk, KEYS: tl.constexpr):
    """``selected [queries, topk]``: the keys of the highest scores from begin to place; else -1."""
    query = tl.program_id(0).to(tl.int64)
    first, last = tl.load(begins + query), tl.load(places + query)
    row, out = scores + query * n_keys, selected + query * topk
    offsets = tl.arange(0, KEYS)
    n_seen = last + 1 - first
    wanted = tl.minimum(topk, n_seen)
    found = tl.zeros([], tl.uint32)  # the digits found so far of the least score that is selected;
    # 0 is below all scores, so that all are taken where there are no more than topk
    if n_seen > topk:
        for digit in tl.static_range(4):
            counts = tl.zeros([256], tl.int32)
            for start in range(first, last + 1, KEYS):
                keys = start + offsets
                value = _ordered(tl.load(row + keys, mask=keys <= last, other=0.0))
                same = keys <= last
                if digit > 0:
                    same = same & ((value >> (32 - 8 * digit)) == found)
                digits = ((value >> (24 - 8 * digit)) & 255).to(tl.int32)
                counts += tl.histogram(digits, 256, mask=same)
            bins = tl.arange(0, 256)
            above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # in higher bins
            here = (above < wanted) & (above + counts >= wanted)
            chosen = tl.sum(tl.where(here, bins, 0), axis=0)
            wanted -= tl.sum(tl.where(here, above, 0), axis=0)
            found = (found << 8) | chosen.to(tl.uint32)
    written = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for start in range(first, last + 1, KEYS):
        keys = start + offsets
        value = _ordered(tl.load(row + keys, mask=keys <= last, other=0.0))
        higher, equal = (keys <= last) & (value > found), (keys <= last) & (value == found)
        tie = ties + tl.cumsum(equal.to(tl.int32), axis=0)
        taken = higher | (equal & (tie <= wanted))
        slot = written + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(out + slot, keys, mask=taken)
        written += tl.sum(taken.to(tl.int32), axis=0)
        ties += tl.sum(equal.to(tl.int32), axis=0)
    for start in range(0, topk, KEYS):
        slots = start + offsets
        tl.store(out + slots, -1, mask=(slots >= written) & (slots < topk))


def index_topk(
    q_BTJI: Tensor,
    k_BSI: Tensor,
    weight_BTJ: Tensor,
    k_scale_BS: Tensor | None,
    places_BT: Tensor,
    begins_BT: Tensor,
    topk: int,
) -> Tensor:
    """The visible tokens of highest score, int32 ``[B, T, topk]``, in order; -1 behind them."""
    batch, n_queries, heads, width = q_BTJI.shape
    n_keys = k_BSI.shape[1]
    selected_BTN = torch.empty(batch, n_queries, topk, dtype=torch.int32, device=q_BTJI.device)
    step = min(n_queries, max(1, WORKSPACE_BYTES // (4 * n_keys)))
    scores = torch.empty(step, n_keys, dtype=torch.float32, device=q_BTJI.device)
    tile, columns = SCORE_TILE, max(16, triton.next_power_of_2(width))
    for b in range(batch):
        for a in range(0, n_queries, step):
            c = slice(a, min(a + step, n_queries))
            places, begins = (t[b, c].to(torch.int32).contiguous() for t in (places_BT, begins_BT))
            count = c.stop - a
            grid = triton.cdiv(n_keys, tile["KEYS"]), triton.cdiv(count, tile["QUERIES"])
            _scores[grid](
                q_BTJI[b, c].contiguous(),
                k_BSI[b].contiguous(),
                weight_BTJ[b, c].float().contiguous(),
                weight_BTJ if k_scale_BS is None else k_scale_BS[b].contiguous(),
                places,
                begins,
                scores,
                count,
                n_keys,
                heads,
                width,
                columns,
                k_scale_BS is not None,
                **tile,
            )
            select(scores[:count], places, begins, selected_BTN[b, c])
    return selected_BTN


def select(scores_MS: Tensor, places_M: Tensor, begins_M: Tensor, selected_MN: Tensor) -> None:
    """Write each row's best into ``selected``; float32 scores and int32, all contiguous."""
    (count, n_keys), topk = scores_MS.shape, selected_MN.shape[1]
    _select[(count,)](scores_MS, places_M, begins_M, selected_MN, n_keys, topk, **SELECT_TILE)
