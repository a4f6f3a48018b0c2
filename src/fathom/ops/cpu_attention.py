"""PyTorch's flash attention for the CPU, for any widths, and the FLOPs of attention.

The kernel wants queries, keys and values of one width. Padding with zeros changes no score and is
1.4 times faster than the matmuls that PyTorch falls back to (4 heads of 24 and 16, 16 x 256
tokens); as an op of our own it counts the FLOPs of the true widths.

Shapes: B batch, T queries, S keys, H query heads, G key-value heads, Q query and key width, V value
width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fathom.ops.registry import op, wide


def forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Scores and mixing, every key counted for every query; shapes ``[B, H, T, Q]``."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def backward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Five matmuls: the scores again, two against the values, two for queries and keys."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def _heads_first(*shapes: Sequence[int]) -> list[Sequence[int]]:
    return [(s[0], s[2], s[1], s[3]) for s in shapes]


def _fake_cpu(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q_BTHQ.shape
    lse_BTH = q_BTHQ.new_empty((batch, length, heads), dtype=wide(q_BTHQ.dtype))
    return q_BTHQ.new_empty((batch, length, heads, v_BSGV.shape[3])), lse_BTH


def _setup_cpu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BTHQ, k_BSGQ, v_BSGV, bias, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q_BTHQ, k_BSGQ, v_BSGV, bias, *output)
    ctx.mark_non_differentiable(output[1])


def _backward_cpu(ctx: Any, grad_BTHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_BTHQ, k_BSGQ, v_BSGV, bias, out_BTHV, lse_BTH = ctx.saved_tensors
    grads = cpu_attention_backward(
        grad_BTHV, q_BTHQ, k_BSGQ, v_BSGV, out_BTHV, lse_BTH, bias, ctx.causal, ctx.scale
    )
    return *grads, None, None, None


def plain_cpu_attention(
    q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel, every width padded with zeros to the largest."""
    q, k, v = _padded(q_BTHQ, k_BSGQ, v_BSGV)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)[..., : v_BSGV.shape[3]], lse.transpose(1, 2)


@op(
    "cpu_attention",
    fake=_fake_cpu,
    flops=lambda q, k, v, *_: forward_flops(*_heads_first(q, k, v)),
    setup=_setup_cpu,
    backward=_backward_cpu,
)
def cpu_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same as an op, with a gradient and FLOPs of the true widths."""
    out_BTHV, lse_BTH = plain_cpu_attention(q_BTHQ, k_BSGQ, v_BSGV, bias, causal, scale)
    return out_BTHV.contiguous(), lse_BTH.contiguous()


@op(
    "cpu_attention_backward",
    fake=lambda grad, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
    flops=lambda grad, q, k, v, *_: backward_flops(*_heads_first(q, k, v)),
)
def cpu_attention_backward(
    grad_BTHV: Tensor,
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, grad = _padded(q_BTHQ, k_BSGQ, v_BSGV, out_BTHV, grad_BTHV)
    lse = lse_BTH.transpose(1, 2)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    dq, dk, dv = (
        g.transpose(1, 2)[..., : t.shape[3]].contiguous()
        for g, t in zip(grads, (q_BTHQ, k_BSGQ, v_BSGV), strict=True)
    )
    return dq, dk, dv


def _padded(*tensors: Tensor) -> list[Tensor]:
    """``[B, T, H, D]`` as ``[B, H, T, D]`` of one width, its channels side by side."""
    width = max(t.shape[3] for t in tensors)
    wider = (pad(t, (0, width - t.shape[3])) if t.shape[3] < width else t for t in tensors)
    return [(t if t.stride(3) == 1 else t.contiguous()).transpose(1, 2) for t in wider]


def _register_flops() -> None:
    """PyTorch counts no FLOPs on the CPU, and 2.11 refuses to count shared keys anywhere."""
    for kernel in ("flash_attention_for_cpu", "flash", "efficient", "cudnn"):
        name = f"_scaled_dot_product_{kernel}" + ("" if "cpu" in kernel else "_attention")
        forward = getattr(torch.ops.aten, name)
        backward = getattr(torch.ops.aten, f"{name}_backward")
        flop_registry.pop(forward, None)
        flop_registry.pop(backward, None)
        register_flop_formula(forward)(lambda q, k, v, *_, **__: forward_flops(q, k, v))
        register_flop_formula(backward)(lambda _, q, k, v, *__, **___: backward_flops(q, k, v))


_register_flops()
