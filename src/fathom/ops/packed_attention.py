"""Causal attention within packed documents: a query reads its own document, and not past itself.

``torch`` is flash attention over documents of unequal lengths (arXiv:2307.08691), which reads no
mask. It wants queries, keys and values of one width, so the narrower are padded with zeros. cuDNN's
form for unequal lengths, which would take them as they are, gives wrong gradients in PyTorch 2.11.

Shapes: B batch, T tokens, N documents, H query heads, G key-value heads, Q query and key width, V
value width. Query head ``h`` reads key-value head ``h // (H / G)``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fathom.ops.attention import additive, attention_reference, check_heads
from fathom.ops.registry import (
    Impl,
    Implementations,
    autocast,
    choose,
    no_kernel,
    op,
    takes_all,
    width_refusal,
)


def flash_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What PyTorch's flash attention needs."""
    if device != "cuda":
        return f"it needs CUDA tensors, got {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {dtype}"
    if any(t.numel() == 0 for t in tensors):
        return f"it needs tensors with elements, got shapes {[tuple(t.shape) for t in tensors]}"
    return width_refusal(*tensors) if tensors else ""


PACKED_ATTENTION = Implementations(
    op="packed_attention",
    refusals={"triton": no_kernel, "torch": flash_refusal, "reference": takes_all},
)


def packed_attention(
    q_BTHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGV: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """For each query the softmax mean over its document so far, ``[B, T, H, V]``.

    Args:
        q_BTHQ: queries.
        k_BTGQ: keys; G divides H.
        v_BTGV: values; V may differ from Q.
        cu_seqlens: int32 ``[N+1]``, borders of the documents over the flattened ``B*T`` tokens,
            from 0 to ``B*T``; each row starts a document, and a document may be empty.
        scale: what a score is multiplied by.
        window_size: see only the newest ``window_size`` tokens, oneself included; None: all.
        impl: which implementation.

    The softmax is in float32 (float64 for float64), the result in q's dtype.

    Raises:
        ValueError: G does not divide H, or a refused ``impl``.
    """
    q_BTHQ, k_BTGQ, v_BTGV = autocast(q_BTHQ, k_BTGQ, v_BTGV)
    check_heads(q_BTHQ, k_BTGQ)
    if choose(PACKED_ATTENTION, impl, q_BTHQ, k_BTGQ, v_BTGV) == "reference":
        batch, length = q_BTHQ.shape[:2]
        seen_BTT = same_document(cu_seqlens, batch, length, window_size)
        bias = additive(seen_BTT[:, None], q_BTHQ.dtype)
        return attention_reference(q_BTHQ, k_BTGQ, v_BTGV, scale, bias)
    width = max(q_BTHQ.shape[-1], v_BTGV.shape[-1])
    q, k, v = widened(q_BTHQ, width), widened(k_BTGQ, width), widened(v_BTGV, width)
    out = _packed_attention(q, k, v, cu_seqlens, scale, window_size or 0)[0]
    return out[..., : v_BTGV.shape[-1]]


def widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with zeros as further channels, itself if there are none."""
    more = width - tensor.shape[-1]
    return pad(tensor, (0, more)) if more else tensor


def same_document(
    cu_seqlens: Tensor, batch: int, length: int, window_size: int | None = None
) -> Tensor:
    """Which tokens of a row each one sees, bool ``[B, T, T]``."""
    flat = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document_BT = torch.searchsorted(cu_seqlens, flat, right=True).view(batch, length)
    places = torch.arange(length, device=cu_seqlens.device)
    distance_TT = places[:, None] - places
    near_TT = (distance_TT >= 0) & (distance_TT < (window_size or length))
    return (document_BT[:, :, None] == document_BT[:, None, :]) & near_TT


def _forward_flops(q: Any, k: Any, v: Any, *_: Any) -> int:
    """As if a row were one document and had no window: borders are data."""
    batch, length, heads, width = q
    return 2 * batch * length * length * heads * width


@op(
    "packed_attention_backward",
    fake=lambda q, k, v, *_: tuple(torch.empty_like(t) for t in (q, k, v)),
    flops=lambda *shapes: 5 * _forward_flops(*shapes) // 2,
)
def _packed_attention_backward(
    q_BTHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGQ: Tensor,
    cu_seqlens: Tensor,
    out_BTHQ: Tensor,
    lse_HN: Tensor,
    dout_BTHQ: Tensor,
    scale: float,
    window_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    length = q_BTHQ.shape[1]
    dropout = torch.zeros(2, dtype=torch.uint64, device=q_BTHQ.device)  # a state: there is none
    dout, q, k, v, out = (t.flatten(0, 1) for t in (dout_BTHQ, q_BTHQ, k_BTGQ, v_BTGQ, out_BTHQ))
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(dout, q, k, v, out, lse_HN, cu_seqlens, cu_seqlens, length, length, 0.0, True),
        *(dropout, lse_HN.new_empty(0)),
        scale=scale,
        window_size_left=window_size - 1,
        window_size_right=0,
    )
    return dq.view_as(q_BTHQ), dk.view_as(k_BTGQ), dv.view_as(v_BTGQ)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.window_size = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout_BTHQ: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dout = dout_BTHQ.contiguous()
    q, k, v, borders, out, lse = ctx.saved_tensors
    options = (ctx.scale, ctx.window_size)
    grads = _packed_attention_backward(q, k, v, borders, out, lse, dout, *options)
    return *grads, None, None, None


@op(
    "packed_attention",
    fake=lambda q, *_: (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=torch.float32),
    ),
    flops=_forward_flops,
    setup=_setup,
    backward=_backward,
)
def _packed_attention(
    q_BTHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGQ: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window_size: int,  # 0: none
) -> tuple[Tensor, Tensor]:
    """The mean of the values, and the log-sum-exp ``[H, B*T]``."""
    length = q_BTHQ.shape[1]
    q, k, v = (t.flatten(0, 1) for t in (q_BTHQ, k_BTGQ, v_BTGQ))
    out, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, cu_seqlens, cu_seqlens, length, length, 0.0, True, False),
        scale=scale,
        window_size_left=window_size - 1,
        window_size_right=0,
    )
    return out.view_as(q_BTHQ), lse_HN
