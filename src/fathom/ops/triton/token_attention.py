"""MLA's absorbed attention over selected tokens: key width C + R, its first C channels the value.

A program has all heads of a query, or 64 of them, as the rows of its matrix products, and gathers
that query's latents; a latent is loaded once, as key and as value. The backward recomputes the
weights from the saved log-sum-exp, in chunks of queries:

1. the weights P and the score gradients dS of the chunk are written down;
2. ``dq = dS k`` gathers the latents once more: one kernel for both would not fit in registers;
3. each query's share of its keys' gradients, ``dS^T q + P^T dout``, is one batched matrix product;
4. a stable sort of the chunk's (query, selected token) by token, and a kernel in which each token
   adds up its own list, in the order of the queries.

So no two programs write to one place, and the same inputs give the same bits.

Shapes: M queries of all rows, H heads, N selected tokens, S keys of all rows, F = C + R. Capital
kernel arguments are constants.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations ask for a constexpr where it takes any number.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.triton.softmax import LOG2_E, Tile, finish_softmax, key_rows, online_softmax

ENTRIES = 16  # of a list, that a program reads at a time
CHUNK_BYTES = 2**31  # of one chunk's shares of the keys' gradients


@triton.jit
def _rows(k, tokens, C: tl.constexpr, R: tl.constexpr):
    """The latents and rotated keys of some tokens; zeros for -1."""
    at = k + tokens[:, None] * (C + R)
    there = (tokens >= 0)[:, None]
    latent = tl.load(at + tl.arange(0, C)[None, :], mask=there, other=0.0)
    rope = tl.load(at + C + tl.arange(0, R)[None, :], mask=there, other=0.0)
    return latent, rope


@triton.jit
def _heads(q, heads, H: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr):
    """The first ``COLUMNS`` channels of some heads' rows, which are W wide."""
    at = q + heads[:, None] * W + tl.arange(0, COLUMNS)[None, :]
    if H % HEADS == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(heads < H)[:, None], other=0.0)


@triton.jit
def _store_heads(
    out, rows, heads, H: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr
):
    """The inverse."""
    at = out + heads[:, None] * W + tl.arange(0, COLUMNS)[None, :]
    if H % HEADS == 0:
        tl.store(at, rows.to(out.dtype.element_ty))
    else:
        tl.store(at, rows.to(out.dtype.element_ty), mask=(heads < H)[:, None])


@triton.jit
def _scores(q_latent, q_rope, latent, rope, tokens, scale_log2):
    """``q . k`` in base 2, ``-inf`` where there is no token."""
    scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
    scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee") * scale_log2
    return tl.where((tokens >= 0)[None, :], scores, float("-inf"))


@triton.jit
def _forward(
    q,
    k,
    selected,
    out,
    lse,
    T,
    room,
    n_selected,
    scale_log2,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``out [M, H, C]`` and the log-sum-exp in base 2, ``[M, H]`` (+inf where nothing is seen)."""
    tiles: tl.constexpr = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    heads = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)
    q += query * (H * (C + R))
    q_latent = _heads(q, heads, H, HEADS, C + R, C)
    q_rope = _heads(q + C, heads, H, HEADS, C + R, R)
    k += query // T * room * (C + R)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, C], tl.float32)
    # Hoisted out of the loop, the addresses of q's parts would fill the registers.
    for start in tl.range(0, n_selected, TOKENS, disable_licm=True):
        slots = start + tl.arange(0, TOKENS)
        tokens = tl.load(selected + query * n_selected + slots)
        latent, rope = _rows(k, tokens, C, R)
        scores = _scores(q_latent, q_rope, latent, rope, tokens, scale_log2)
        weights, top, total, shrink = online_softmax(scores, top, total)
        acc = tl.dot(
            weights.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee"
        )
    acc, log = finish_softmax(acc, top, total)
    _store_heads(out + query * (H * C), acc, heads, H, HEADS, C, C)
    _store_heads(lse + query * H, log[:, None], heads, H, HEADS, 1, 1)


@triton.jit
def _slopes(
    q,
    k,
    selected,
    out,
    dout,
    lse,
    slopes,
    n_selected,
    scale,
    scale_log2,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``slopes [M, 2 H, N]``: the weights P, then the gradients dS of the scores.

    The next tile's latents come through registers: Triton starts an indirect copy only after the
    products of the tile before, and two tiles would not fit beside the heads of q and dout.
    """
    tiles: tl.constexpr = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    heads = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)
    q += query * (H * (C + R))
    q_latent = _heads(q, heads, H, HEADS, C + R, C)
    q_rope = _heads(q + C, heads, H, HEADS, C + R, R)
    dout_latent = _heads(dout + query * (H * C), heads, H, HEADS, C, C)
    log = tl.load(lse + query * H + heads, mask=heads < H, other=float("inf"))
    out_latent = _heads(out + query * (H * C), heads, H, HEADS, C, C)
    mean = tl.sum(out_latent.to(tl.float32) * dout_latent, axis=1)
    slopes += query * (2 * H * n_selected)
    selected += query * n_selected
    some = tl.arange(0, TOKENS)
    tokens = tl.load(selected + some)
    tokens_after = tl.load(selected + TOKENS + some, mask=TOKENS + some < n_selected, other=-1)
    latent, rope = _rows(k, tokens, C, R)
    for start in tl.range(0, n_selected, TOKENS, num_stages=1, disable_licm=True):
        slots, ahead = start + some, start + 2 * TOKENS + some
        latent_after, rope_after = _rows(k, tokens_after, C, R)
        tokens_ahead = tl.load(selected + ahead, mask=ahead < n_selected, other=-1)
        scores = _scores(q_latent, q_rope, latent, rope, tokens, scale_log2)
        weights = tl.exp2(scores - log[:, None])
        dweights = tl.dot(dout_latent, tl.trans(latent), input_precision="ieee")
        dscores = weights * (dweights - mean[:, None]) * scale
        into = slopes + heads[:, None] * n_selected + slots[None, :]
        tl.store(into, weights.to(latent.dtype), mask=(heads < H)[:, None])
        tl.store(into + H * n_selected, dscores.to(latent.dtype), mask=(heads < H)[:, None])
        latent, rope = latent_after, rope_after
        tokens, tokens_after = tokens_after, tokens_ahead


@triton.jit
def _dq(
    slopes,
    k,
    selected,
    dq,
    n_selected,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``dq = dS k``."""
    tiles: tl.constexpr = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    heads = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)
    dscores_at = slopes + (query * 2 + 1) * (H * n_selected) + heads[:, None] * n_selected
    acc = tl.zeros([HEADS, C], tl.float32)
    rope_acc = tl.zeros([HEADS, R], tl.float32)
    for start in tl.range(0, n_selected, TOKENS, disable_licm=True):
        slots = start + tl.arange(0, TOKENS)
        tokens = tl.load(selected + query * n_selected + slots)
        latent, rope = _rows(k, tokens, C, R)
        dscores = tl.load(dscores_at + slots[None, :], mask=(heads < H)[:, None], other=0.0)
        acc = tl.dot(dscores, latent, acc, input_precision="ieee")
        rope_acc = tl.dot(dscores, rope, rope_acc, input_precision="ieee")
    dq += query * (H * (C + R))
    _store_heads(dq, acc, heads, H, HEADS, C + R, C)
    _store_heads(dq + C, rope_acc, heads, H, HEADS, C + R, R)


@triton.jit
def _add_lists(shares, order, ends, dk, C: tl.constexpr, R: tl.constexpr, ENTRIES: tl.constexpr):
    """Each token adds the rows of ``shares`` that its list names to its row of ``dk``, float32."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(ends + token - 1, mask=token > 0, other=0)
    end = tl.load(ends + token)
    if first == end:
        return
    latent = tl.zeros([C], tl.float32)
    rope = tl.zeros([R], tl.float32)
    for start in range(first, end, ENTRIES):
        places = start + tl.arange(0, ENTRIES)
        entries = tl.load(order + places, mask=places < end, other=-1).to(tl.int32)
        some_latent, some_rope = _rows(shares, entries, C, R)
        latent += tl.sum(some_latent.to(tl.float32), axis=0)
        rope += tl.sum(some_rope.to(tl.float32), axis=0)
    at = dk + token * (C + R)
    latent_at, rope_at = at + tl.arange(0, C), at + C + tl.arange(0, R)
    tl.store(latent_at, tl.load(latent_at) + latent)
    tl.store(rope_at, tl.load(rope_at) + rope)


NAMES = ("TOKENS", "HEADS")  # of a tile's keys and rows
TILES = {  # by what fits in Hopper's registers and shared memory at C = 512, R = 64
    "forward": Tile(64, 64, 8, 3),
    "slopes": Tile(64, 64, 8, 1),
    "dq": Tile(64, 64, 8, 3),
}
SMALL = Tile(16, 16, 4, 1)  # few heads, or float32


def tile(kernel: str, dtype: torch.dtype, n_heads: int) -> Tile:
    return SMALL if dtype == torch.float32 or n_heads <= SMALL.rows else TILES[kernel]


def padded(selected: Tensor) -> Tensor:
    """With -1 to a whole number of tiles in the last dim."""
    largest = max(t.keys for t in (SMALL, *TILES.values()))
    wanted = -selected.shape[-1] % largest
    return torch.nn.functional.pad(selected, (0, wanted), value=-1).contiguous()


def forward(
    q_BTHF: Tensor, k_BSF: Tensor, selected_BTN: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The mix ``[B, T, H, C]`` and the log-sum-exp in base 2 ``[B, T, H]``.

    Queries are contiguous, of the keys each batch row is.
    """
    batch, length, heads, width = q_BTHF.shape
    out_BTHC = q_BTHF.new_empty(batch, length, heads, value_dim)
    lse_BTH = q_BTHF.new_empty(batch, length, heads, dtype=torch.float32)
    cut, selected_BTN = tile("forward", q_BTHF.dtype, heads), padded(selected_BTN)
    room, (k_BS1F,) = key_rows(k_BSF[:, :, None])
    _forward[(batch * length * triton.cdiv(heads, cut.rows),)](
        q_BTHF,
        k_BS1F,
        selected_BTN,
        out_BTHC,
        lse_BTH,
        length,
        room,
        selected_BTN.shape[2],
        scale * LOG2_E,
        heads,
        value_dim,
        width - value_dim,
        **cut.options(*NAMES),
    )
    return out_BTHC, lse_BTH


def backward(
    dout_MHC: Tensor,
    q_MHF: Tensor,
    k_SF: Tensor,
    selected_MN: Tensor,
    out_MHC: Tensor,
    lse_MH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of queries and keys."""
    selected_MN = padded(selected_MN)
    queries, heads, width = q_MHF.shape
    value_dim, n_selected = out_MHC.shape[2], selected_MN.shape[1]
    dq_MHF, dk_SF = torch.empty_like(q_MHF), torch.zeros_like(k_SF, dtype=torch.float32)
    sizes = heads, value_dim, width - value_dim
    first, second = (tile(kernel, q_MHF.dtype, heads) for kernel in ("slopes", "dq"))
    step = max(1, CHUNK_BYTES // (n_selected * width * q_MHF.itemsize))
    for a in range(0, queries, step):
        q, selected, dout = q_MHF[a : a + step], selected_MN[a : a + step], dout_MHC[a : a + step]
        slopes = q.new_empty(len(q), 2 * heads, n_selected)
        _slopes[(len(q) * triton.cdiv(heads, first.rows),)](
            q,
            k_SF,
            selected,
            out_MHC[a : a + step],
            dout,
            lse_MH[a : a + step],
            slopes,
            n_selected,
            scale,
            scale * LOG2_E,
            *sizes,
            **first.options(*NAMES),
        )
        grid = (len(q) * triton.cdiv(heads, second.rows),)
        dq = dq_MHF[a : a + step]
        _dq[grid](slopes, k_SF, selected, dq, n_selected, *sizes, **second.options(*NAMES))
        wide_dout = torch.nn.functional.pad(dout, (0, width - value_dim))
        shares = torch.bmm(slopes.mT, torch.cat([wide_dout, q], dim=1))
        add_by_token(shares, selected, dk_SF, value_dim)
    return dq_MHF, dk_SF.to(k_SF.dtype)


def add_by_token(shares_MNF: Tensor, selected_MN: Tensor, dk_SF: Tensor, value_dim: int) -> None:
    """Add each query's share to the keys it selected, in the order of the queries."""
    n_keys, width = dk_SF.shape
    bins = selected_MN.where(selected_MN >= 0, n_keys).flatten()
    found = bins.sort(stable=True)
    tokens = torch.arange(n_keys, device=bins.device, dtype=bins.dtype)
    ends = torch.searchsorted(found.values, tokens, right=True)
    _add_lists[n_keys,](
        shares_MNF,
        found.indices,
        ends,
        dk_SF,
        value_dim,
        width - value_dim,
        ENTRIES=ENTRIES,
        num_warps=4,
    )
