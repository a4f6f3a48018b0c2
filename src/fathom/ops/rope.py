"""Rotary position embedding: turn channel pairs by given angles (arXiv:2104.09864, eq. 34).

Pairs are half-split: channel ``i`` turns with ``i + D/2``.

Shapes: B batch, T tokens, H heads, D = 2R rotated channels.
"""

import torch
from torch import Tensor


def rotate(x_BTHD: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` for the halves a, b of the last dimension.

    Computed in float32 (float64 for float64), returned in x's dtype.
    """
    a, b = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([a * cos_BT1R - b * sin_BT1R, b * cos_BT1R + a * sin_BT1R], dim=-1)
    return turned.to(x_BTHD.dtype)
