"""Attention over a range of keys for each query: flash attention (arXiv:2307.08691), two bounds.

The heads that share a key head are rows of one tile, so that a few queries fill a matrix product.
Bounds never fall along a row: a tile of queries reads the keys from its lowest bound to
its highest, and a tile of keys is read by the queries between two binary searches. Where keys are
few (compressed entries), several programs share the queries of one tile of keys, and their sums are
added in a fixed order.

Shapes: B batch, T queries, S keys, H query heads, G key heads, R = H / G, Q query and key width, V
value width. Capital kernel arguments are constants; those ending in P are padded to a power of two.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's annotations ask for a constexpr where it takes any number.)

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.triton.softmax import (
    LOG2_E,
    Tile,
    finish_softmax,
    group_sizes,
    key_rows,
    load_rows,
    online_softmax,
    padded,
    store_rows,
)

TILES = {  # bf16 and float16, widths up to 128; measured on an H100 at a width of 128
    "forward": Tile(64, 64, 4, 3),
    "dq": Tile(32, 64, 4, 3),
    "dkv": Tile(128, 32, 8, 3),
}
LARGE = {  # widths above 128, and float32
    "forward": Tile(32, 64, 4, 2),
    "dq": Tile(32, 64, 4, 2),
    "dkv": Tile(32, 32, 4, 2),
}
ENOUGH_PROGRAMS = 528  # four for each multiprocessor of an H100
MAX_SPLITS = 32


@triton.jit
def _queries(tile, end, b, g, T, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
             ROWS: tl.constexpr):  # fmt: skip
    """Rows of a tile: head r of query ``tile + x // RP``. Their queries, rows in ``q``, and which
    are there; the others repeat the last."""
    x = tl.arange(0, ROWS)
    t, r = tile + x // RP, x % RP
    bt = b * T + tl.minimum(t, end - 1)
    return bt, bt * H + g * R + tl.minimum(r, R - 1), (t < end) & (r < R)


@triton.jit
def _bounds(lows, highs, bt, there, S):
    """A row's bounds, and the range of keys that a tile reads."""
    low, high = tl.load(lows + bt), tl.load(highs + bt)
    seen = there & (low < high)
    first = tl.min(tl.where(seen, low, S))
    last = tl.max(tl.where(seen, high, 0))
    return low, high, first, last


@triton.jit
def _forward(
    q, k, v, lows, highs, out, lse, T, S, room, scale,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one key head; the latest, which may see most, begin first."""
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS // RP)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    bt, row, there = _queries(tile, T, b, g, T, H, R, RP, ROWS)
    low, high, first, last = _bounds(lows, highs, bt, there, S)
    q_XQ = load_rows(q, row, Q, QP)
    head = b.to(tl.int64) * room * G + g
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VP], tl.float32)
    for start in range(first, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        at = head + tl.minimum(keys, last - 1) * G
        k_KQ = load_rows(k, at, Q, QP)
        v_KV = load_rows(v, at, V, VP)
        scores = tl.dot(q_XQ, tl.trans(k_KQ), input_precision="ieee") * scale
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        weights, top, total, shrink = online_softmax(scores, top, total)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v_KV.dtype), v_KV, acc, input_precision="ieee")
    acc, log_sum = finish_softmax(acc, top, total)
    store_rows(out, row, there, acc, V, VP)
    tl.store(lse + row, log_sum, mask=there)


@triton.jit
def _dq(
    q, k, v, lows, highs, out, dout, lse, delta, dq, T, S, scale, back_scale,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and ``delta = sum(out * dout)`` for the kernel that follows."""
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS // RP)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    bt, row, there = _queries(tile, T, b, g, T, H, R, RP, ROWS)
    low, high, first, last = _bounds(lows, highs, bt, there, S)
    dout_XV = load_rows(dout, row, V, VP)
    delta_X = tl.sum(load_rows(out, row, V, VP).to(tl.float32) * dout_XV, 1)
    tl.store(delta + row, delta_X, mask=there)
    q_XQ = load_rows(q, row, Q, QP)
    lse_X = tl.load(lse + row)
    head = b.to(tl.int64) * S * G + g
    acc = tl.zeros([ROWS, QP], tl.float32)
    for start in range(first, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        at = head + tl.minimum(keys, last - 1) * G
        k_KQ = load_rows(k, at, Q, QP)
        v_KV = load_rows(v, at, V, VP)
        scores = tl.dot(q_XQ, tl.trans(k_KQ), input_precision="ieee") * scale
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        weights = tl.where(seen, tl.exp2(scores - lse_X[:, None]), 0.0)
        dweights = tl.dot(dout_XV, tl.trans(v_KV), input_precision="ieee")
        dscores = weights * (dweights - delta_X[:, None])
        acc = tl.dot(dscores.to(k_KQ.dtype), k_KQ, acc, input_precision="ieee")
    store_rows(dq, row, there, acc * back_scale, Q, QP)


@triton.jit
def _dkv(
    q, k, v, lows, highs, firsts, lasts, dout, lse, delta, dk, dv, T, S, scale, back_scale,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, QP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A share of the queries that see one tile of keys; ``dk`` and ``dv`` have a row per share."""
    tile, share = tl.program_id(0), tl.program_id(1)
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    keys = tile * KEYS + tl.arange(0, KEYS)
    real = keys < S
    at = b.to(tl.int64) * S * G + g + tl.minimum(keys, S - 1) * G
    k_KQ = load_rows(k, at, Q, QP)
    v_KV = load_rows(v, at, V, VP)
    first = tl.load(firsts + b * tl.num_programs(0) + tile)
    last = tl.load(lasts + b * tl.num_programs(0) + tile)
    step: tl.constexpr = ROWS // RP
    length = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), step), tl.num_programs(1)) * step
    first += share * length
    last = tl.minimum(first + length, last)
    dk_KQ = tl.zeros([KEYS, QP], tl.float32)
    dv_KV = tl.zeros([KEYS, VP], tl.float32)
    for query in tl.range(first, last, step, disable_licm=True):
        bt, row, there = _queries(query, last, b, g, T, H, R, RP, ROWS)
        q_XQ = load_rows(q, row, Q, QP)
        dout_XV = load_rows(dout, row, V, VP)
        lse_X = tl.load(lse + row, mask=there, other=float("inf"))
        delta_X, low, high = tl.load(delta + row), tl.load(lows + bt), tl.load(highs + bt)
        scores = tl.dot(k_KQ, tl.trans(q_XQ), input_precision="ieee") * scale
        seen = (keys[:, None] >= low[None, :]) & (keys[:, None] < high[None, :])
        weights = tl.where(seen, tl.exp2(scores - lse_X[None, :]), 0.0)
        dv_KV = tl.dot(weights.to(dout_XV.dtype), dout_XV, dv_KV, input_precision="ieee")
        dweights = tl.dot(v_KV, tl.trans(dout_XV), input_precision="ieee")
        dscores = weights * (dweights - delta_X[None, :])
        dk_KQ = tl.dot(dscores.to(q_XQ.dtype), q_XQ, dk_KQ, input_precision="ieee")
    at += share.to(tl.int64) * tl.num_programs(2) * S
    store_rows(dk, at, real, dk_KQ * back_scale, Q, QP)
    store_rows(dv, at, real, dv_KV, V, VP)


def tile(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tile:
    """The tile of a kernel for a call."""
    large = max(q.shape[3], v.shape[3]) > 128 or q.dtype == torch.float32
    chosen = (LARGE if large else TILES)[kernel]
    rows = max(chosen.rows, triton.next_power_of_2(q.shape[2] // k.shape[2]))
    return replace(chosen, rows=rows)


def constants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """What every kernel is specialised for, by the names of its arguments."""
    return group_sizes(q, k) | {"V": v.shape[3], "VP": padded(v.shape[3])}


def forward(
    q: Tensor, k: Tensor, v: Tensor, lows: Tensor, highs: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``out_BTHV`` and ``lse_BTH`` (float32, base 2; ``+inf`` where a query sees nothing).

    All tensors are contiguous (of keys and values each batch row), the bounds int32.
    """
    room, (k, v) = key_rows(k, v)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cut, fixed = tile("forward", q, k, v), constants(q, k, v)
    grid = (triton.cdiv(q.shape[1], cut.rows // fixed["RP"]), k.shape[0] * k.shape[2])
    _forward[grid](
        q, k, v, lows, highs, out, lse, q.shape[1], k.shape[1], room, scale * LOG2_E,
        **fixed, **cut.options(),
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, lows: Tensor, highs: Tensor, out: Tensor, lse: Tensor,
    dout: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, from what ``forward`` took and gave."""
    k, v = k.contiguous(), v.contiguous()
    length, (batch, n_keys, groups, _) = q.shape[1], k.shape
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    cut, fixed = tile("dq", q, k, v), constants(q, k, v)
    _dq[(triton.cdiv(length, cut.rows // fixed["RP"]), batch * groups)](
        q, k, v, lows, highs, out, dout, lse, delta, dq, length, n_keys, scale * LOG2_E, scale,
        **fixed, **cut.options(),
    )  # fmt: skip
    cut = tile("dkv", q, k, v)
    begins = torch.arange(0, n_keys, cut.keys, device=k.device, dtype=torch.int32)
    begins = begins.expand(batch, -1).contiguous()
    firsts = torch.searchsorted(highs, begins, right=True, out_int32=True)
    lasts = torch.searchsorted(lows, begins + cut.keys, out_int32=True)
    programs = begins.numel() * groups
    shares = min(triton.cdiv(ENOUGH_PROGRAMS, programs), MAX_SPLITS)
    dtype = k.dtype if shares == 1 else torch.float32
    dk = k.new_empty(shares, *k.shape, dtype=dtype)
    dv = v.new_empty(shares, *v.shape, dtype=dtype)
    _dkv[(begins.shape[1], shares, batch * groups)](
        q, k, v, lows, highs, firsts, lasts, dout, lse, delta, dk, dv, length, n_keys,
        scale * LOG2_E, scale, **fixed, **cut.options(),
    )  # fmt: skip
    if shares == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)
