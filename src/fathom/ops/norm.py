"""RMSNorm (arXiv:1910.07467): divide by the root mean square, multiply by a weight.

The order of casts is Hugging Face Llama's and DeepSeek's: the normalised value returns to x's dtype
*before* the weight multiplies it. ``F.rms_norm`` casts last, which changes about a quarter of all
bfloat16 results; in float32 both orders are the same.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * cast(x * rsqrt(mean(x**2) + eps))`` over the last dimension.

    Computed in float32 (float64 for float64); the result has the dtype that ``weight`` and ``x``
    promote to.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)
