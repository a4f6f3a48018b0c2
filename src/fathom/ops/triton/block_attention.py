"""Attention over selected blocks: forward and a backward without atomic operations.

Two ways through the same pairs of query and block:

- *by query* (NSA's paper, arXiv:2502.11089, section 3.4): a program has one query's heads that
  share a selection as the rows of its matrix products and reads that query's blocks.
- *by block* (Flash Sparse Attention, arXiv:2508.18224; FlashMoBA, arXiv:2511.11571): a program has
  rows gathered from many queries that chose one block, and a later kernel merges what a query's
  blocks gave. For few heads per selection, which would leave most of a tile's rows empty.

Keys and values always get their gradients by block, through ``block_lists``.

Shapes: B batch, T queries, S keys, H query heads, G key heads, M pairs of key head and selection,
R = H / M heads of a pair, N blocks, Q query and key width, V value width. Capital kernel arguments
are constants; those ending in P are padded to a power of two.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's annotations ask for a constexpr where it takes any number.)

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.triton.block_lists import Lists, chunks, lists
from fathom.ops.triton.softmax import (
    LOG2_E,
    Tile,
    finish_softmax,
    key_rows,
    load_rows,
    online_softmax,
    padded,
    store_rows,
)

FEW_HEADS = 8  # below this many heads per selection, rows are gathered by block ...
FEW_QUERIES = 8  # ... unless there are no more queries than this, of which no block has many
CHUNK_ROWS = 65_536  # rows of a chunk of a list at most, for the gradients of keys and values
CHUNKS_EACH = 4  # chunks that a program gets at least: the longest must not make the others wait
MIN_CHUNK = 256  # entries
MERGED = 16  # rows that a program merges

TILES = {  # bf16 and float16, widths up to 128; measured on an H100 at a width of 128
    "forward_by_query": Tile(32, 16, 2, 3),
    "dq_by_query": Tile(32, 16, 2, 3),
    "forward_by_block": Tile(64, 128, 8, 3),
    "dq_by_block": Tile(64, 128, 8, 2),
    "dkv_by_block": Tile(64, 64, 4, 3),
}
LARGE = {  # widths above 128, and float32
    "forward_by_query": Tile(32, 16, 4, 2),
    "dq_by_query": Tile(32, 16, 4, 2),
    "forward_by_block": Tile(32, 64, 4, 2),
    "dq_by_block": Tile(32, 64, 4, 2),
    "dkv_by_block": Tile(32, 32, 4, 2),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    batch: int
    length: int
    n_keys: int
    heads: int
    groups: int
    pairs: int
    blocks: int
    width: int
    values: int
    block_size: int

    @property
    def rows(self) -> int:
        return self.heads // self.pairs

    @property
    def by_block(self) -> bool:
        return self.rows < FEW_HEADS and self.length > FEW_QUERIES

    def constants(self, names: str = "H G M R N BLOCK Q QP V VP") -> dict[str, int]:
        """What a kernel is specialised for, by the names of its arguments."""
        every = {
            "H": self.heads,
            "G": self.groups,
            "M": self.pairs,
            "R": self.rows,
            "N": self.blocks,
            "BLOCK": self.block_size,
            "Q": self.width,
            "QP": padded(self.width),
            "V": self.values,
            "VP": padded(self.values),
        }
        return {name: every[name] for name in names.split()}


@triton.jit
def _key_tile(tile, starts_row, N: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The keys of one tile of a query's blocks; a large number for those of no block."""
    if BLOCK % KEYS == 0:
        start = tl.load(starts_row + tile // (BLOCK // KEYS))
        keys = start + tile % (BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
    else:
        flat = tile * KEYS + tl.arange(0, KEYS)
        start = tl.load(starts_row + flat // BLOCK, mask=flat < N * BLOCK, other=-1)
        keys = start + flat % BLOCK
    return tl.where(start < 0, 2147483647, keys)


@triton.jit
def _forward_by_query(
    q, k, v, starts, places, out, lse, T, S, room, scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """One query and the heads of one pair; programs of one key head follow each other."""
    bt = tl.program_id(2) * T + tl.program_id(0)
    pair, r = tl.program_id(1), tl.arange(0, RP)
    row, there = bt * H + pair * R + tl.minimum(r, R - 1), r < R
    q_RQ = load_rows(q, row, Q, QP)
    last = tl.minimum(tl.load(places + bt), S - 1)
    starts_row = starts + (bt.to(tl.int64) * M + pair) * N
    head = tl.program_id(2).to(tl.int64) * room * G + pair // (M // G)
    top = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, VP], tl.float32)
    for tile in range(tl.cdiv(N * BLOCK, KEYS)):
        keys = _key_tile(tile, starts_row, N, BLOCK, KEYS)
        at = head + tl.minimum(keys, last) * G
        k_KQ = load_rows(k, at, Q, QP)
        v_KV = load_rows(v, at, V, VP)
        scores = tl.dot(q_RQ, tl.trans(k_KQ), input_precision="ieee") * scale
        scores = tl.where((keys <= last)[None, :], scores, float("-inf"))
        weights, top, total, shrink = online_softmax(scores, top, total)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v_KV.dtype), v_KV, acc, input_precision="ieee")
    acc, log_sum = finish_softmax(acc, top, total)
    store_rows(out, row, there, acc, V, VP)
    tl.store(lse + row, log_sum, mask=there)


@triton.jit
def _dq_by_query(
    q, k, v, starts, places, out, dout, lse, delta, dq, T, S, scale, back_scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and ``delta = sum(out * dout)`` for the kernel that follows."""
    bt = tl.program_id(2) * T + tl.program_id(0)
    pair, r = tl.program_id(1), tl.arange(0, RP)
    row, there = bt * H + pair * R + tl.minimum(r, R - 1), r < R
    q_RQ = load_rows(q, row, Q, QP)
    dout_RV = load_rows(dout, row, V, VP)
    out_RV = load_rows(out, row, V, VP)
    delta_R = tl.sum(out_RV.to(tl.float32) * dout_RV.to(tl.float32), 1)
    tl.store(delta + row, delta_R, mask=there)
    lse_R = tl.load(lse + row)
    last = tl.minimum(tl.load(places + bt), S - 1)
    starts_row = starts + (bt.to(tl.int64) * M + pair) * N
    head = tl.program_id(2).to(tl.int64) * S * G + pair // (M // G)
    acc = tl.zeros([RP, QP], tl.float32)
    for tile in range(tl.cdiv(N * BLOCK, KEYS)):
        keys = _key_tile(tile, starts_row, N, BLOCK, KEYS)
        at = head + tl.minimum(keys, last) * G
        k_KQ = load_rows(k, at, Q, QP)
        v_KV = load_rows(v, at, V, VP)
        scores = tl.dot(q_RQ, tl.trans(k_KQ), input_precision="ieee") * scale
        weights = tl.where((keys <= last)[None, :], tl.exp2(scores - lse_R[:, None]), 0.0)
        dweights = tl.dot(dout_RV, tl.trans(v_KV), input_precision="ieee")
        dscores = weights * (dweights - delta_R[:, None])
        acc = tl.dot(dscores.to(k_KQ.dtype), k_KQ, acc, input_precision="ieee")
    store_rows(dq, row, there, acc * back_scale, Q, QP)


@triton.jit
def _chunk(table, chunk, S, G: tl.constexpr):
    """A chunk's row of the table: where its block begins, its first row in ``k`` of key 0, and the
    entries from first to end."""
    bin_ = tl.load(table + chunk * 5)
    head = (bin_ // (S * G)).to(tl.int64) * S * G + bin_ // S % G
    return bin_ % S, head, tl.load(table + chunk * 5 + 1), tl.load(table + chunk * 5 + 2)


@triton.jit
def _gathered(
    entries, first, end, H: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of a tile: head r of entry ``first + x // RP``. Their query, row in ``q``, row in the
    partial results, and which of them are there; the others repeat the last."""
    x = tl.arange(0, ROWS)
    at, r = first + x // RP, tl.minimum(x % RP, R - 1)
    entry = tl.load(entries + tl.minimum(at, end - 1))
    bt = entry // (N * M)
    return bt, bt * H + entry // N % M * R + r, entry * R + r, (at < end) & (x % RP < R)


@triton.jit
def _forward_by_block(
    q, k, v, places, entries, table, count, part_out, part_lse, S, scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """Chunks of one tile of rows each: the softmax of each row over the keys of this block."""
    for chunk in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        start, head, first, end = _chunk(table, chunk, S, G)
        bt, row, part, there = _gathered(entries, first, end, H, M, R, RP, N, ROWS)
        q_XQ = load_rows(q, row, Q, QP)
        last = tl.minimum(tl.load(places + bt), tl.minimum(start + BLOCK, S) - 1)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, VP], tl.float32)
        for offset in range(0, BLOCK, KEYS):
            keys = start + offset + tl.arange(0, KEYS)
            at = head + tl.minimum(keys, S - 1) * G
            k_KQ = load_rows(k, at, Q, QP)
            v_KV = load_rows(v, at, V, VP)
            scores = tl.dot(q_XQ, tl.trans(k_KQ), input_precision="ieee") * scale
            scores = tl.where(keys[None, :] <= last[:, None], scores, float("-inf"))
            weights, top, total, shrink = online_softmax(scores, top, total)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v_KV.dtype), v_KV, acc, input_precision="ieee")
        acc, log_sum = finish_softmax(acc, top, total)
        store_rows(part_out, part, there, acc, V, VP)
        tl.store(part_lse + part, log_sum, mask=there)


@triton.jit
def _merge(
    part_out, part_lse, starts, out, lse, n_rows, S,
    H: tl.constexpr, M: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A query's softmax over all its blocks from that over each; ``+inf`` says a block had none."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, row = row < n_rows, tl.minimum(row, n_rows - 1)
    dv = tl.arange(0, VP)
    pair = row // H * M + row % H // R
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VP], tl.float32)
    for n in range(N):
        start = tl.load(starts + pair.to(tl.int64) * N + n)
        part = (pair.to(tl.int64) * N + n) * R + row % R
        part_X = tl.load(part_lse + part, mask=(start >= 0) & (start < S), other=float("inf"))
        chosen = part_X != float("inf")
        scores = tl.where(chosen, part_X, float("-inf"))[:, None]
        weights, top, total, shrink = online_softmax(scores, top, total)
        mask = chosen[:, None] & (dv < V)
        mean = tl.load(part_out + part[:, None] * V + dv, mask=mask, other=0.0)
        acc = acc * shrink[:, None] + weights * mean.to(tl.float32)
    acc, log_sum = finish_softmax(acc, top, total)
    store_rows(out, row, there, acc, V, VP)
    tl.store(lse + row, log_sum, mask=there)


@triton.jit
def _delta(out, dout, delta, n_rows, V: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr):
    """``sum(out * dout)`` of each row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, row = row < n_rows, tl.minimum(row, n_rows - 1)
    product = load_rows(out, row, V, VP).to(tl.float32) * load_rows(dout, row, V, VP)
    tl.store(delta + row, tl.sum(product, 1), mask=there)


@triton.jit
def _dq_by_block(
    q, k, v, places, dout, lse, delta, entries, table, count, part_dq, S, scale, back_scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """Chunks of one tile of rows each: what this block adds to the gradient of each row."""
    for chunk in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        start, head, first, end = _chunk(table, chunk, S, G)
        bt, row, part, there = _gathered(entries, first, end, H, M, R, RP, N, ROWS)
        q_XQ = load_rows(q, row, Q, QP)
        dout_XV = load_rows(dout, row, V, VP)
        lse_X, delta_X = tl.load(lse + row), tl.load(delta + row)
        last = tl.minimum(tl.load(places + bt), tl.minimum(start + BLOCK, S) - 1)
        acc = tl.zeros([ROWS, QP], tl.float32)
        for offset in range(0, BLOCK, KEYS):
            keys = start + offset + tl.arange(0, KEYS)
            at = head + tl.minimum(keys, S - 1) * G
            k_KQ = load_rows(k, at, Q, QP)
            v_KV = load_rows(v, at, V, VP)
            scores = tl.dot(q_XQ, tl.trans(k_KQ), input_precision="ieee") * scale
            seen = keys[None, :] <= last[:, None]
            weights = tl.where(seen, tl.exp2(scores - lse_X[:, None]), 0.0)
            dweights = tl.dot(dout_XV, tl.trans(v_KV), input_precision="ieee")
            dscores = weights * (dweights - delta_X[:, None])
            acc = tl.dot(dscores.to(k_KQ.dtype), k_KQ, acc, input_precision="ieee")
        store_rows(part_dq, part, there, acc * back_scale, Q, QP)


@triton.jit
def _sum_blocks(
    part_dq, starts, dq, n_rows, S,
    H: tl.constexpr, M: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A query's gradient from those of its blocks, in their order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, row = row < n_rows, tl.minimum(row, n_rows - 1)
    cols = tl.arange(0, QP)
    pair = row // H * M + row % H // R
    acc = tl.zeros([ROWS, QP], tl.float32)
    for n in range(N):
        start = tl.load(starts + pair.to(tl.int64) * N + n)
        part = (pair.to(tl.int64) * N + n) * R + row % R
        mask = ((start >= 0) & (start < S))[:, None] & (cols < Q)
        acc += tl.load(part_dq + part[:, None] * Q + cols, mask=mask, other=0.0).to(tl.float32)
    store_rows(dq, row, there, acc, Q, QP)


@triton.jit
def _dkv_by_block(
    q, k, v, places, dout, lse, delta, entries, table, count, dk, dv, part_dk, part_dv,
    S, scale, back_scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """A chunk of a block's list for some of its keys: their gradients, or the chunk's part."""
    TILES: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    n_work = tl.load(count) * TILES
    for work in tl.range(tl.program_id(0), n_work, tl.num_programs(0), disable_licm=True):
        start, head, first, end = _chunk(table, work // TILES, S, G)
        offset = work % TILES * KEYS
        stop = tl.minimum(tl.load(table + work // TILES * 5 + 3), start + BLOCK)
        keys = start + offset + tl.arange(0, KEYS)
        at = head + tl.minimum(keys, S - 1) * G
        real = keys < stop
        keys = tl.where(real, keys, 2147483647)
        k_KQ = load_rows(k, at, Q, QP)
        v_KV = load_rows(v, at, V, VP)
        dk_KQ = tl.zeros([KEYS, QP], tl.float32)
        dv_KV = tl.zeros([KEYS, VP], tl.float32)
        for tile in tl.range(first, end, ROWS // RP, disable_licm=True):
            bt, row, _, there = _gathered(entries, tile, end, H, M, R, RP, N, ROWS)
            q_XQ = load_rows(q, row, Q, QP)
            dout_XV = load_rows(dout, row, V, VP)
            lse_X = tl.load(lse + row, mask=there, other=float("inf"))
            delta_X, place = tl.load(delta + row), tl.load(places + bt)
            scores = tl.dot(k_KQ, tl.trans(q_XQ), input_precision="ieee") * scale
            weights = tl.exp2(scores - lse_X[None, :])
            weights = tl.where(keys[:, None] <= place[None, :], weights, 0.0)
            dv_KV = tl.dot(weights.to(dout_XV.dtype), dout_XV, dv_KV, input_precision="ieee")
            dweights = tl.dot(v_KV, tl.trans(dout_XV), input_precision="ieee")
            dscores = weights * (dweights - delta_X[None, :])
            dk_KQ = tl.dot(dscores.to(q_XQ.dtype), q_XQ, dk_KQ, input_precision="ieee")
        part = tl.load(table + work // TILES * 5 + 4)
        if part < 0:
            store_rows(dk, at, real, dk_KQ * back_scale, Q, QP)
            store_rows(dv, at, real, dv_KV, V, VP)
        else:
            at = part.to(tl.int64) * BLOCK + offset + tl.arange(0, KEYS)
            store_rows(part_dk, at, real, dk_KQ * back_scale, Q, QP)
            store_rows(part_dv, at, real, dv_KV, V, VP)


@triton.jit
def _sum_parts(
    parts, table, count, ends, to, S,
    G: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    CHUNK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block whose list was cut, from its chunks in their order."""
    cols = tl.arange(0, DP)
    for work in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        start, head, first, _ = _chunk(table, work, S, G)
        bin_, limit = tl.load(table + work * 5), tl.load(table + work * 5 + 3)
        part = tl.load(table + work * 5 + 4).to(tl.int64)
        before = tl.load(ends + bin_ - 1, mask=bin_ > 0, other=0)
        if (part >= 0) & (first == before):  # the first chunk of its list
            pieces = tl.cdiv(tl.load(ends + bin_) - first, CHUNK)
            for offset in range(0, BLOCK, KEYS):
                inside = offset + tl.arange(0, KEYS)
                real = (inside < BLOCK) & (start + inside < limit)
                acc = tl.zeros([KEYS, DP], tl.float32)
                for piece in range(pieces):
                    at = (part + piece) * BLOCK + inside
                    mask = real[:, None] & (cols < D)
                    acc += tl.load(parts + at[:, None] * D + cols, mask=mask, other=0.0)
                store_rows(to, head + (start + inside) * G, real, acc, D, DP)


def programs(device: torch.device, each: int) -> int:
    """How many programs a kernel that walks a work list is started with."""
    if device.type != "cuda":
        return 2
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def chunk_length(entries: int, heads: int, workers: int) -> int:
    """Entries of a chunk: a power of two, of which kernels that add up chunks are compiled."""
    most = max(CHUNK_ROWS // heads, 1)
    fair = entries // (CHUNKS_EACH * workers)
    return min(most, max(1 << fair.bit_length() >> 1, min(MIN_CHUNK, most)))


def tile(kernel: str, shape: Shape, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for a call."""
    large = max(shape.width, shape.values) > 128 or dtype == torch.float32
    chosen = (LARGE if large else TILES)[kernel]
    rows = max(chosen.rows, triton.next_power_of_2(shape.rows))
    if kernel.endswith("by_query"):  # a warp for 16 rows
        return replace(chosen, rows=rows, warps=max(chosen.warps, rows // 16))
    keys = min(chosen.keys, max(triton.next_power_of_2(shape.block_size), 16))
    return replace(chosen, rows=rows, keys=keys)


def sizes(q: Tensor, k: Tensor, v: Tensor, starts_BTMN: Tensor, block_size: int) -> Shape:
    """The sizes of a call."""
    return Shape(
        batch=q.shape[0],
        length=q.shape[1],
        n_keys=k.shape[1],
        heads=q.shape[2],
        groups=k.shape[2],
        pairs=starts_BTMN.shape[2],
        blocks=starts_BTMN.shape[3],
        width=q.shape[3],
        values=v.shape[3],
        block_size=block_size,
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, places: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """``out_BTHV`` and ``lse_BTH`` (float32, base 2; ``+inf`` where a query sees nothing).

    All tensors are contiguous (of keys and values each batch row), ``starts_BTMN`` has one
    selection for each pair, places are int32.
    """
    shape = sizes(q, k, v, starts, block_size)
    out = q.new_empty(*q.shape[:3], shape.values)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    constants, scale_2 = shape.constants(), scale * LOG2_E
    if not shape.by_block:
        cut, (room, (k, v)) = tile("forward_by_query", shape, q.dtype), key_rows(k, v)
        _forward_by_query[(shape.length, shape.pairs, shape.batch)](
            q, k, v, starts, places, out, lse, shape.length, shape.n_keys, room, scale_2,
            **constants, RP=padded(shape.rows), **cut.options(rows=None),
        )  # fmt: skip
        return out, lse
    k, v, heads = k.contiguous(), v.contiguous(), triton.next_power_of_2(shape.rows)
    cut = tile("forward_by_block", shape, q.dtype)
    made = lists(starts, shape.groups, shape.n_keys)
    pieces = chunks(made, cut.rows // heads, 0)
    part_out = q.new_empty(starts.numel() * shape.rows, shape.values)
    part_lse = lse.new_empty(len(part_out))
    _forward_by_block[(programs(q.device, 2),)](
        q, k, v, places, made.entries, pieces.table, pieces.number, part_out, part_lse,
        shape.n_keys, scale_2, **constants, RP=heads, **cut.options(),
    )  # fmt: skip
    n_rows = lse.numel()
    _merge[(triton.cdiv(n_rows, MERGED),)](
        part_out, part_lse, starts, out, lse, n_rows, shape.n_keys,
        **shape.constants("H M R N V VP"), ROWS=MERGED,
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, places: Tensor, out: Tensor, lse: Tensor,
    dout: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, from what ``forward`` took and gave."""
    k, v, shape = k.contiguous(), v.contiguous(), sizes(q, k, v, starts, block_size)
    made = lists(starts, shape.groups, shape.n_keys)
    inputs = (q, k, v, starts, places, out, dout, lse)
    dq, delta = (_gradient_by_block if shape.by_block else _gradient_by_query)(
        *inputs, shape, made, scale
    )
    constants, scale_2 = shape.constants(), scale * LOG2_E
    cut, heads = tile("dkv_by_block", shape, q.dtype), triton.next_power_of_2(shape.rows)
    length = chunk_length(starts.numel(), heads, programs(q.device, 2))
    pieces = chunks(made, length, shape.length * shape.pairs // shape.groups)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)  # of keys that nobody selected
    part_dk = k.new_empty(pieces.n_parts, block_size, shape.width, dtype=torch.float32)
    part_dv = v.new_empty(pieces.n_parts, block_size, shape.values, dtype=torch.float32)
    _dkv_by_block[(programs(q.device, 2),)](
        q, k, v, places, dout, lse, delta, made.entries, pieces.table, pieces.number,
        dk, dv, part_dk, part_dv, shape.n_keys, scale_2, scale,
        **constants, RP=heads, **cut.options(),
    )  # fmt: skip
    if pieces.n_parts:
        for parts, to in ((part_dk, dk), (part_dv, dv)):
            _sum_parts[(programs(q.device, 2),)](
                parts, pieces.table, pieces.number, made.ends, to, shape.n_keys,
                G=shape.groups, BLOCK=block_size, D=to.shape[3],
                DP=triton.next_power_of_2(to.shape[3]), CHUNK=length, KEYS=16,
            )  # fmt: skip
    return dq, dk, dv


def _gradient_by_query(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, places: Tensor, out: Tensor, dout: Tensor,
    lse: Tensor, shape: Shape, _: Lists, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The queries' gradient and ``delta``."""
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    cut = tile("dq_by_query", shape, q.dtype)
    _dq_by_query[(shape.length, shape.pairs, shape.batch)](
        q, k, v, starts, places, out, dout, lse, delta, dq, shape.length, shape.n_keys,
        scale * LOG2_E, scale, **shape.constants(), RP=padded(shape.rows),
        **cut.options(rows=None),
    )  # fmt: skip
    return dq, delta


def _gradient_by_block(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, places: Tensor, out: Tensor, dout: Tensor,
    lse: Tensor, shape: Shape, made: Lists, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same through a part for each of a query's blocks."""
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    cut, heads = tile("dq_by_block", shape, q.dtype), triton.next_power_of_2(shape.rows)
    pieces, n_rows = chunks(made, cut.rows // heads, 0), lse.numel()
    grid = (triton.cdiv(n_rows, MERGED),)
    _delta[grid](out, dout, delta, n_rows, **shape.constants("V VP"), ROWS=MERGED)
    part_dq = q.new_empty(starts.numel() * shape.rows, shape.width)
    _dq_by_block[(programs(q.device, 2),)](
        q, k, v, places, dout, lse, delta, made.entries, pieces.table, pieces.number, part_dq,
        shape.n_keys, scale * LOG2_E, scale, **shape.constants(), RP=heads, **cut.options(),
    )  # fmt: skip
    _sum_blocks[grid](
        part_dq, starts, dq, n_rows, shape.n_keys,
        **shape.constants("H M R N Q QP"), ROWS=MERGED,
    )  # fmt: skip
    return dq, delta
