"""Attention over a range of keys for each query: a window, or the compressed entries so far.

Sliding windows and the compressed branch of NSA (arXiv:2502.11089, section 3.3) are this one op:
query t sees keys ``[low_t, high_t)``. Neither bound ever falls along a row, so the queries that see
a key are a range too, and a kernel needs no other mask, packed documents included.

``triton`` reads each query's keys alone; ``torch`` multiplies chunks of queries with all keys and
masks.

Shapes: B batch, T queries, S keys, H query heads, G key-value heads, Q query and key width, V value
width. Query head ``h`` reads key-value head ``h // (H / G)``.
"""

from typing import Any

import torch
from torch import Tensor

from fathom.ops.attention import (
    additive,
    attention_reference,
    check_heads,
    torch_attention,
    torch_refusal,
)
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
)


def range_kernel_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the Triton kernels need."""
    if reason := kernel_refusal(device, dtype, *tensors):
        return reason
    if not tensors:
        return ""
    q, k, v = tensors
    return shape_refusal(q.shape[2] // k.shape[2], q, k, v)


RANGE_ATTENTION = Implementations(
    op="range_attention",
    refusals={"triton": range_kernel_refusal, "torch": torch_refusal, "reference": takes_all},
)


def range_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    *,
    scale: float,
    impl: Impl = "auto",
) -> Tensor:
    """The mix of :func:`range_attention_with_sums` alone, ``[B, T, H, V]``."""
    return range_attention_with_sums(
        q_BTHQ, k_BSGQ, v_BSGV, lows_BT, highs_BT, scale=scale, impl=impl
    )[0]


def range_attention_with_sums(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    *,
    scale: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """One softmax over the keys ``[low, high)`` of each query, and its log-sum-exp.

    Args:
        q_BTHQ: queries.
        k_BSGQ: keys; G divides H.
        v_BSGV: values; V may differ from Q.
        lows_BT: int, the first key a query sees; never falls along a row.
        highs_BT: int, the first key it does not see any more, at most S; never falls along a row.
        scale: what a score is multiplied by.
        impl: which implementation.

    Returns:
        The mix ``[B, T, H, V]`` in q's dtype, its softmax in float32 (float64 for float64); an
        empty range gives zeros and passes no gradient back. The log-sum-exp is ``[B, T, H]`` in
        base 2, not differentiable, ``inf`` for an empty range; None where an implementation does
        not have it.

    Raises:
        ValueError: G does not divide H, or a refused ``impl``.
    """
    q_BTHQ, k_BSGQ, v_BSGV = autocast(q_BTHQ, k_BSGQ, v_BSGV)
    check_heads(q_BTHQ, k_BSGQ)
    chosen = choose(RANGE_ATTENTION, impl, q_BTHQ, k_BSGQ, v_BSGV)
    if chosen == "triton":
        return _range_attention(
            q_BTHQ.contiguous(),
            k_BSGQ,
            v_BSGV,
            lows_BT.to(torch.int32).contiguous(),
            highs_BT.to(torch.int32).contiguous(),
            scale,
        )
    core = attention_reference if chosen == "reference" else torch_attention
    batch, n_keys = k_BSGQ.shape[:2]

    def run(q_BTHQ: Tensor, lows_BT: Tensor, highs_BT: Tensor) -> Tensor:
        bias = additive(in_range(lows_BT, highs_BT, n_keys)[:, None], q_BTHQ.dtype)
        return core(q_BTHQ, k_BSGQ, v_BSGV, scale, bias, False)

    numbers = batch * n_keys * (q_BTHQ.shape[2] if chosen == "reference" else 1)
    return by_queries(run, chunk_size(numbers), q_BTHQ, lows_BT, highs_BT), None


def in_range(lows_BT: Tensor, highs_BT: Tensor, n_keys: int) -> Tensor:
    """Which of all keys each query sees, bool ``[B, T, S]``."""
    keys = torch.arange(n_keys, device=lows_BT.device)
    return (keys >= lows_BT[..., None]) & (keys < highs_BT[..., None])


@op(
    "range_attention_backward",
    fake=lambda q, k, v, *_: tuple(torch.empty_like(t) for t in (q, k, v)),
    flops=lambda q, k, v, *_: 2 * q[0] * q[1] * q[2] * k[1] * (3 * q[3] + 2 * v[3]),
)
def _range_attention_backward(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    dout_BTHV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from fathom.ops.triton import range_attention as kernels

    bounds, made = (lows_BT, highs_BT), (out_BTHV, lse_BTH, dout_BTHV)
    return kernels.backward(q_BTHQ, k_BSGQ, v_BSGV, *bounds, *made, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout_BTHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, lows, highs, out, lse = ctx.saved_tensors
    dout = dout_BTHV.contiguous()
    grads = _range_attention_backward(q, k, v, lows, highs, out, lse, dout, ctx.scale)
    return *grads, None, None, None


@op(
    "range_attention",
    fake=lambda q, k, v, *_: (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    ),
    flops=lambda q, k, v, *_: 2 * q[0] * q[1] * q[2] * k[1] * (q[3] + v[3]),
    setup=_setup,
    backward=_backward,
)
def _range_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """FLOPs are counted as if every query saw every key: bounds are data."""
    from fathom.ops.triton import range_attention as kernels

    return kernels.forward(q_BTHQ, k_BSGQ, v_BSGV, lows_BT, highs_BT, scale)
