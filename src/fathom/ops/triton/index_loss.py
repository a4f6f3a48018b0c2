"""The indexer's loss over selected tokens, on the device: its target, its scores, its gradients.

In chunks of queries: the main attention's weights, summed over heads, and the index scores give
``dI = softmax(I) - p`` for the selected tokens alone; from it one more pass over these tokens makes
the gradients. What a query gives to its keys' gradients is written down and added up by token, as
in ``token_attention``: no two programs write to one place.

Shapes: M queries of all rows, J index heads, W index width, N selected tokens, S keys of all rows,
H main heads, F = C + R main key width. Capital kernel arguments are constants.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations ask for a constexpr where it takes any number.)

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.triton.softmax import LOG2_E, Tile
from fathom.ops.triton.token_attention import (
    NAMES,
    _heads,
    _rows,
    _scores,
    add_by_token,
    padded,
)

CHUNK_BYTES = 2**30  # of one chunk's shares of the keys' gradients
TILES = {"mass": Tile(64, 64, 8, 1), "index": Tile(64, 64, 8, 3)}
SMALL = Tile(32, 16, 4, 2)  # few heads, or float32


@triton.jit
def _log_sum(
    q_latent,
    q_rope,
    k,
    selected,
    n_selected,
    scale_log2,
    C: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Log-sum-exp in base 2 of the scores of one query's heads, ``inf`` where nothing is seen."""
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in tl.range(0, n_selected, TOKENS, disable_licm=True):
        tokens = tl.load(selected + start + tl.arange(0, TOKENS))
        latent, rope = _rows(k, tokens, C, R)
        scores = _scores(q_latent, q_rope, latent, rope, tokens, scale_log2)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
        top = higher
    seen = total > 0
    return tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("inf"))


@triton.jit
def _mass(
    q,
    k,
    selected,
    lse,
    mass,
    n_selected,
    scale_log2,
    KNOWN: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``mass [M, tiles, N]``: the softmaxes of a tile of heads, added up. KNOWN: ``lse`` is."""
    tiles: tl.constexpr = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    heads = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)
    q += query * (H * (C + R))
    q_latent = _heads(q, heads, H, HEADS, C + R, C)
    q_rope = _heads(q + C, heads, H, HEADS, C + R, R)
    if KNOWN:
        log = tl.load(lse + query * H + heads, mask=heads < H, other=float("inf"))
    else:
        log = _log_sum(
            q_latent,
            q_rope,
            k,
            selected + query * n_selected,
            n_selected,
            scale_log2,
            C,
            R,
            HEADS,
            TOKENS,
        )
        log = tl.where(heads < H, log, float("inf"))
    into = mass + tl.program_id(0).to(tl.int64) * n_selected
    selected += query * n_selected
    some = tl.arange(0, TOKENS)
    tokens = tl.load(selected + some)
    tokens_after = tl.load(selected + TOKENS + some, mask=TOKENS + some < n_selected, other=-1)
    latent, rope = _rows(k, tokens, C, R)
    # The next tile's latents come through registers: see ``token_attention._slopes``.
    for start in tl.range(0, n_selected, TOKENS, num_stages=1, disable_licm=True):
        ahead = start + 2 * TOKENS + some
        latent_after, rope_after = _rows(k, tokens_after, C, R)
        tokens_ahead = tl.load(selected + ahead, mask=ahead < n_selected, other=-1)
        scores = _scores(q_latent, q_rope, latent, rope, tokens, scale_log2)
        tl.store(into + start + some, tl.sum(tl.exp2(scores - log[:, None]), axis=0))
        latent, rope = latent_after, rope_after
        tokens, tokens_after = tokens_after, tokens_ahead


@triton.jit
def _index_scores(
    q,
    k,
    weight,
    selected,
    scores,
    n_selected,
    J: tl.constexpr,
    W: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``scores [M, N]``: the index scores of the selected tokens, ``-inf`` for none."""
    query = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    q_JW = _heads(q + query * (J * W), heads, J, HEADS, W, W)
    w_J = tl.load(weight + query * J + heads, mask=heads < J, other=0.0)
    for start in tl.range(0, n_selected, TOKENS):
        slots = start + tl.arange(0, TOKENS)
        tokens = tl.load(selected + query * n_selected + slots)
        at = k + tokens[:, None] * W + tl.arange(0, W)[None, :]
        k_NW = tl.load(at, mask=(tokens >= 0)[:, None], other=0.0)
        z_JN = tl.dot(q_JW, tl.trans(k_NW), input_precision="ieee")
        found = tl.sum(tl.maximum(z_JN, 0.0) * w_J[:, None], axis=0)
        found = tl.where(tokens >= 0, found, float("-inf"))
        tl.store(scores + query * n_selected + slots, found)


@triton.jit
def _index_gradients(
    q,
    k,
    weight,
    selected,
    slopes,
    dq,
    dweight,
    shares,
    n_selected,
    J: tl.constexpr,
    W: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """From ``slopes = dI [M, N]``: ``dq``, ``dweight``, and ``shares [M, N, W]`` for the keys."""
    query = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    there = (heads < J)[:, None]
    q_JW = _heads(q + query * (J * W), heads, J, HEADS, W, W)
    w_J = tl.load(weight + query * J + heads, mask=heads < J, other=0.0)
    dq_JW = tl.zeros([HEADS, W], tl.float32)
    dw_J = tl.zeros([HEADS], tl.float32)
    for start in tl.range(0, n_selected, TOKENS):
        slots = start + tl.arange(0, TOKENS)
        tokens = tl.load(selected + query * n_selected + slots)
        at = k + tokens[:, None] * W + tl.arange(0, W)[None, :]
        k_NW = tl.load(at, mask=(tokens >= 0)[:, None], other=0.0)
        slope_N = tl.load(slopes + query * n_selected + slots)
        z_JN = tl.dot(q_JW, tl.trans(k_NW), input_precision="ieee")
        dw_J += tl.sum(tl.maximum(z_JN, 0.0) * slope_N[None, :], axis=1)
        dz_JN = tl.where(z_JN > 0, w_J[:, None] * slope_N[None, :], 0.0).to(k_NW.dtype)
        dq_JW = tl.dot(dz_JN, k_NW, dq_JW, input_precision="ieee")
        share_NW = tl.dot(tl.trans(dz_JN), q_JW, input_precision="ieee")
        into = shares + (query * n_selected + slots)[:, None] * W + tl.arange(0, W)[None, :]
        tl.store(into, share_NW.to(shares.dtype.element_ty))
    columns = tl.arange(0, W)[None, :]
    tl.store(dq + query * (J * W) + heads[:, None] * W + columns, dq_JW, mask=there)
    tl.store(dweight + query * J + heads, dw_J, mask=heads < J)


def tile(kernel: str, dtype: torch.dtype, n_heads: int) -> Tile:
    """All index heads are rows of one program; of the main heads 64."""
    small = dtype == torch.float32 or n_heads <= SMALL.rows
    chosen = SMALL if small else TILES[kernel]
    if kernel == "mass":
        return chosen
    return replace(chosen, rows=max(16, triton.next_power_of_2(n_heads)))


def index_loss(
    q_MJW: Tensor,
    k_SW: Tensor,
    weight_MJ: Tensor,
    main_q_MHF: Tensor,
    main_k_SF: Tensor,
    selected_MN: Tensor,
    main_lse_MH: Tensor | None,
    scale: float,
    need_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss and, if needed, its gradients in q, k and weight, float32."""
    selected_MN = padded(selected_MN)
    queries, n_selected = selected_MN.shape
    heads, width = q_MJW.shape[1:]
    cut = tile("index", q_MJW.dtype, heads)
    losses, grads = [], [torch.empty(0, device=q_MJW.device)] * 3
    if need_grads:
        grads = [torch.empty_like(q_MJW, dtype=torch.float32), torch.zeros_like(k_SW).float()]
        grads.append(torch.empty_like(weight_MJ, dtype=torch.float32))
    step = max(1, CHUNK_BYTES // (n_selected * width * q_MJW.itemsize))
    for a in range(0, queries, step):
        c = slice(a, min(a + step, queries))
        q, weight, selected = q_MJW[c], weight_MJ[c], selected_MN[c]
        shape = n_selected, heads, width
        scores = torch.empty(selected.shape, dtype=torch.float32, device=q.device)
        _index_scores[(len(q),)](q, k_SW, weight, selected, scores, *shape, **cut.options(*NAMES))
        lse = None if main_lse_MH is None else main_lse_MH[c]
        target = main_mass(main_q_MHF[c], main_k_SF, selected, lse, scale)
        log = scores.log_softmax(-1).masked_fill(selected < 0, 0)
        losses.append((torch.xlogy(target, target) - target * log).sum() / queries)
        if need_grads:
            slopes = scores.softmax(-1) - target
            shares = torch.empty(*selected.shape, width, dtype=q.dtype, device=q.device)
            into = grads[0][c], grads[2][c], shares
            _index_gradients[(len(q),)](
                q, k_SW, weight, selected, slopes, *into, *shape, **cut.options(*NAMES)
            )
            add_by_token(shares, selected, grads[1], width // 2)
    return torch.stack(losses).sum(), [grad / queries for grad in grads]


def main_mass(
    q_MHF: Tensor, k_SF: Tensor, selected_MN: Tensor, lse_MH: Tensor | None, scale: float
) -> Tensor:
    """Mean over heads of the main attention's weights of the selected tokens, ``[M, N]``."""
    queries, heads, width = q_MHF.shape
    latent = 1 << (width.bit_length() - 1)
    cut = tile("mass", q_MHF.dtype, heads)
    tiles = triton.cdiv(heads, cut.rows)
    mass = torch.empty(queries, tiles, selected_MN.shape[1], device=q_MHF.device)
    _mass[(queries * tiles,)](
        q_MHF,
        k_SF,
        selected_MN,
        mass if lse_MH is None else lse_MH,
        mass,
        selected_MN.shape[1],
        scale * LOG2_E,
        lse_MH is not None,
        heads,
        latent,
        width - latent,
        **cut.options(*NAMES),
    )
    return mass.sum(dim=1) / heads
