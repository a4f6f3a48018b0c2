"""Attention over selected blocks: every query reads a few blocks of keys and values of its own.

MoBA (arXiv:2502.13189), the selected branch of NSA (arXiv:2502.11089) and, with blocks of one
token, DSA (DeepSeek-V3.2-Exp) are this one op; they differ in who selects.

``triton`` reads the selected blocks alone, forward and backward. ``torch`` multiplies whole chunks
of queries with all keys and masks what was not selected: on a CPU faster than gathering until
selections are very sparse. ``reference`` gathers: the definition, and the way for a few queries
(decoding), which then read their own blocks alone.

Shapes: B batch, T queries, S keys, H query heads, G key-value heads, I selection heads, N blocks a
query selects, K = N * block_size keys, M = lcm(G, I) different pairs of key head and selection,
R = H / M query heads for each, Q query and key width, V value width. Query head ``h`` reads
key-value head ``h // (H / G)`` at the blocks of selection head ``h // (H / I)``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fathom.ops.attention import FEW_QUERIES, additive, torch_attention
from fathom.ops.chunks import by_queries, chunk_size
from fathom.ops.registry import (
    Impl,
    Implementations,
    autocast,
    choose,
    kernel_refusal,
    op,
    shape_refusal,
    takes_all,
    wide,
)


def masked_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What masking all keys needs."""
    if any(t.numel() == 0 for t in tensors):
        return f"it needs queries, keys and blocks, got shapes {[tuple(t.shape) for t in tensors]}"
    if tensors and tensors[0].shape[1] <= FEW_QUERIES:
        return f"it needs more than {FEW_QUERIES} queries: fewer gather what they selected"
    return ""


def block_kernel_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the Triton kernels need."""
    if reason := kernel_refusal(device, dtype, *tensors):
        return reason
    if not tensors:
        return ""
    q, k, v, starts = tensors
    return shape_refusal(q.shape[2] // math.lcm(k.shape[2], starts.shape[2]), q, k, v)


BLOCK_ATTENTION = Implementations(
    op="block_attention",
    refusals={"triton": block_kernel_refusal, "torch": masked_refusal, "reference": takes_all},
)


def block_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    starts_BTIN: Tensor,
    places_BT: Tensor,
    *,
    block_size: int,
    scale: float,
    impl: Impl = "auto",
) -> Tensor:
    """One softmax over the keys of each query's blocks, ``[B, T, H, V]``.

    Args:
        q_BTHQ: queries.
        k_BSGQ: keys; G divides H.
        v_BSGV: values; V may differ from Q.
        starts_BTIN: int32, the first key of each block, -1 for none, in any order; the blocks of a
            query do not overlap, and those of different queries begin at the same key or show no
            common one. I divides H.
        places_BT: where the query itself stands among the S keys. A block shows the keys
            ``[start, start + block_size)`` up to this place, so that a query that selects blocks of
            its own document alone sees nothing else.
        block_size: keys of a block.
        scale: what a score is multiplied by.
        impl: which implementation.

    The softmax is in float32 (float64 for float64), the result in q's dtype. A query without a key
    gives zeros and passes no gradient back. ``starts`` and ``places`` get no gradient.

    Raises:
        ValueError: G or I does not divide H, or a refused ``impl``.
    """
    q_BTHQ, k_BSGQ, v_BSGV = autocast(q_BTHQ, k_BSGQ, v_BSGV)
    heads, groups, selections = q_BTHQ.shape[2], k_BSGQ.shape[2], starts_BTIN.shape[2]
    if heads % groups or heads % selections:
        raise ValueError(
            f"{heads} query heads do not divide among {groups} key heads and {selections} "
            "selection heads"
        )
    chosen = choose(BLOCK_ATTENTION, impl, q_BTHQ, k_BSGQ, v_BSGV, starts_BTIN)
    if chosen == "triton":
        pairs = math.lcm(groups, selections)
        starts_BTMN = starts_BTIN.repeat_interleave(pairs // selections, dim=2)
        return _block_attention(
            q_BTHQ.contiguous(),
            k_BSGQ,
            v_BSGV,
            starts_BTMN.contiguous(),
            places_BT.to(torch.int32).contiguous(),
            block_size,
            scale,
        )[0]
    run = block_attention_reference if chosen == "reference" else masked_block_attention
    return run(q_BTHQ, k_BSGQ, v_BSGV, starts_BTIN, places_BT, block_size, scale)


def keys_of_blocks(
    starts_BTIN: Tensor, places_BT: Tensor, block_size: int, n_keys: int
) -> tuple[Tensor, Tensor]:
    """The keys that blocks show, int64 ``[B, T, I, K]``, and which of them are there.

    What is not there (no block, or later than the query) stands as key 0.
    """
    offsets = torch.arange(block_size, device=starts_BTIN.device)
    keys = starts_BTIN[..., None] + offsets
    there = (starts_BTIN >= 0)[..., None] & (keys <= places_BT[:, :, None, None, None])
    there = (there & (keys < n_keys)).flatten(-2)
    return keys.flatten(-2).masked_fill(~there, 0), there


def block_attention_reference(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    starts_BTIN: Tensor,
    places_BT: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """The definition: gather each query's keys and values, then attend."""
    batch, n_keys, groups, _ = k_BSGQ.shape
    selections, blocks = starts_BTIN.shape[2:]
    pairs = math.lcm(groups, selections)
    if n_keys == 0 or blocks == 0:
        nothing = 0 * (q_BTHQ.sum() + k_BSGQ.sum() + v_BSGV.sum())
        return q_BTHQ.new_zeros(*q_BTHQ.shape[:3], v_BSGV.shape[3]) + nothing
    rows = torch.arange(batch, device=k_BSGQ.device)[:, None, None, None]
    key_heads = torch.arange(pairs, device=k_BSGQ.device)[:, None] // (pairs // groups)

    def run(q_BTHQ: Tensor, starts_BTIN: Tensor, places_BT: Tensor) -> Tensor:
        keys_BTIK, there_BTIK = keys_of_blocks(starts_BTIN, places_BT, block_size, n_keys)
        keys_BTMK = keys_BTIK.repeat_interleave(pairs // selections, dim=2)
        there_BTMK = there_BTIK.repeat_interleave(pairs // selections, dim=2)
        k_BTMKQ = k_BSGQ[rows, keys_BTMK, key_heads].to(wide(k_BSGQ.dtype))
        v_BTMKV = v_BSGV[rows, keys_BTMK, key_heads].to(wide(v_BSGV.dtype))
        q_BTMRQ = q_BTHQ.unflatten(2, (pairs, -1)).to(k_BTMKQ.dtype)
        scores_BTMRK = scale * (q_BTMRQ @ k_BTMKQ.mT)
        sees_BTM11 = there_BTMK.any(-1)[..., None, None]
        hidden = ~there_BTMK[..., None, :] & sees_BTM11
        weights_BTMRK = scores_BTMRK.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights_BTMRK @ v_BTMKV * sees_BTM11).flatten(2, 3).to(q_BTHQ.dtype)

    gathered = batch * pairs * blocks * block_size * (q_BTHQ.shape[3] + v_BSGV.shape[3])
    return by_queries(run, chunk_size(gathered), q_BTHQ, starts_BTIN, places_BT)


def masked_block_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    starts_BTIN: Tensor,
    places_BT: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """All keys for every query, those that were not selected masked."""
    batch, n_keys = k_BSGQ.shape[:2]
    heads, selections = q_BTHQ.shape[2], starts_BTIN.shape[2]

    def run(q_BTHQ: Tensor, starts_BTIN: Tensor, places_BT: Tensor) -> Tensor:
        seen_BTIS = selected_keys(starts_BTIN, places_BT, block_size, n_keys)
        seen_BHTS = seen_BTIS.transpose(1, 2).repeat_interleave(heads // selections, dim=1)
        bias = additive(seen_BHTS, q_BTHQ.dtype)
        return torch_attention(q_BTHQ, k_BSGQ, v_BSGV, scale, bias, False)

    return by_queries(run, chunk_size(batch * heads * n_keys), q_BTHQ, starts_BTIN, places_BT)


def selected_keys(starts_BTIN: Tensor, places_BT: Tensor, block_size: int, n_keys: int) -> Tensor:
    """Which of all keys a query reads, bool ``[B, T, I, S]``."""
    keys_BTIK, there_BTIK = keys_of_blocks(starts_BTIN, places_BT, block_size, n_keys)
    counts = torch.zeros(*starts_BTIN.shape[:3], n_keys, dtype=torch.int8, device=keys_BTIK.device)
    return counts.scatter_add_(-1, keys_BTIK, there_BTIK.to(torch.int8)) > 0


def _pairs(q: torch.Size, starts: torch.Size, block_size: int) -> int:
    """Pairs of query and key, as if all blocks were whole."""
    return q[0] * q[1] * q[2] * starts[3] * block_size


@op(
    "block_attention_backward",
    fake=lambda q, k, v, *_: tuple(torch.empty_like(t) for t in (q, k, v)),
    flops=lambda q, k, v, starts, places, out, lse, dout, block_size, scale: (
        2 * _pairs(q, starts, block_size) * (3 * q[3] + 2 * v[3])
    ),
)
def _block_attention_backward(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    starts_BTMN: Tensor,
    places_BT: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    dout_BTHV: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from fathom.ops.triton import block_attention as kernels

    return kernels.backward(
        q_BTHQ,
        k_BSGQ,
        v_BSGV,
        starts_BTMN,
        places_BT,
        out_BTHV,
        lse_BTH,
        dout_BTHV,
        block_size,
        scale,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout_BTHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts, places, out, lse = ctx.saved_tensors
    dout = dout_BTHV.contiguous()
    grads = _block_attention_backward(
        q, k, v, starts, places, out, lse, dout, ctx.block_size, ctx.scale
    )
    return *grads, None, None, None, None


@op(
    "block_attention",
    fake=lambda q, k, v, *_: (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    ),
    flops=lambda q, k, v, starts, places, block_size, scale: (
        2 * _pairs(q, starts, block_size) * (q[3] + v[3])
    ),
    setup=_setup,
    backward=_backward,
)
def _block_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    starts_BTMN: Tensor,
    places_BT: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from fathom.ops.triton import block_attention as kernels

    inputs = (q_BTHQ, k_BSGQ, v_BSGV, starts_BTMN, places_BT, block_size, scale)
    return kernels.forward(*inputs)
