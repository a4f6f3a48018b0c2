"""Rotary position embedding: turn pairs of channels by given angles (arXiv:2104.09864, eq. 34).

Pairs are half-split: channel ``i`` turns with channel ``i + R``.

Shapes: B batch, T tokens, H heads, D = 2R rotated channels.
"""

import torch
from torch import Tensor

from fathom.ops.registry import wide


def rotate(x_BTHD: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` for the halves a, b of the last dimension.

    Computed in float32 (float64 for float64), returned in x's dtype.
    """
    x = x_BTHD.to(wide(x_BTHD.dtype))
    swapped = x.roll(cos_BT1R.shape[-1], dims=-1)  # (b, a)
    cos = torch.cat([cos_BT1R, cos_BT1R], dim=-1)
    sin = torch.cat([-sin_BT1R, sin_BT1R], dim=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x_BTHD.dtype)
