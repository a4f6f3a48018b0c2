"""RMSNorm (arXiv:1910.07467): divide by the root mean square, multiply by a weight.

The casts are in the order of Hugging Face's Llama and DeepSeek: the normalised value returns to x's
dtype *before* the weight multiplies it. ``F.rms_norm`` casts last, which changes about a quarter of
all bfloat16 results; in float32 there is no cast and no difference.

Shapes: D normalised width, the last dimension; anything before it.
"""

from typing import Any

import torch
from torch import Tensor

from fathom.ops.registry import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * cast(x * rsqrt(mean(x**2) + eps))`` over the last dimension.

    Computed in float32 (float64 for float64); the result has the dtype that ``weight`` and the cast
    value promote to.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == wide(x.dtype):
        if torch.is_grad_enabled():
            return _WideRMSNorm.apply(x, weight, eps)
        return (x * _factor(x, eps)).mul_(weight)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition; on a GPU ``torch.compile`` makes it one kernel."""
    x_wide = x.to(wide(x.dtype))
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return weight * (x_wide * scale).to(x.dtype)


def _factor(x: Tensor, eps: float) -> Tensor:
    """``1 / rms(x)`` of each row."""
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


class _WideRMSNorm(torch.autograd.Function):
    """The same without casts, and with a backward of few passes over memory.

    With r the factor of a row: ``dx = r * (g w) - x * r**3 * mean(g w x)``, ``dw = sum(r g x)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _factor(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        x, weight, scale = ctx.saved_tensors
        product = grad * x
        slope = (product @ weight).unsqueeze(-1) * scale**3 / -x.shape[-1]
        dweight = product.reshape(-1, x.shape[-1]).T.mv(scale.reshape(-1))
        dx = product.copy_(grad).mul_(weight).mul_(scale).addcmul_(x, slope)
        return dx, dweight, None
