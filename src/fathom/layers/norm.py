"""RMSNorm (arXiv:1910.07467) as a module."""

import torch
from torch import Tensor, nn

from fathom.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last dim; the product with ``weight`` in x's own dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
