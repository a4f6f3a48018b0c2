"""SwiGLU: ``w_down(silu(w_gate x) * w_up x)`` (arXiv:2002.05202, section 2).

Every token reads all of it. Shapes: B batch, T tokens, D model dim.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import silu

from fathom.ffn.base import FFN, FFNConfig, require_inter_dim
from fathom.layers.linear import Linear, each_of
from fathom.layers.step import Step


@dataclass(frozen=True, kw_only=True)
class DenseConfig(FFNConfig):
    """One MLP for all tokens.

    Args:
        inter_dim: its inner width.
        bias: biases on all three products.
    """

    kind: Literal["dense"] = "dense"
    inter_dim: int
    bias: bool = False

    def __post_init__(self) -> None:
        require_inter_dim(self.inter_dim)

    def build(self, dim: int) -> "SwiGLU":
        return SwiGLU(dim, self.inter_dim, bias=self.bias)

    def num_params(self, dim: int) -> int:
        biases = 2 * self.inter_dim + dim if self.bias else 0
        return 3 * dim * self.inter_dim + biases

    def num_active_params(self, dim: int) -> int:
        return self.num_params(dim)

    def flops_per_token(self, dim: int) -> int:
        return 2 * 3 * dim * self.inter_dim


class SwiGLU(FFN):
    """``forward(x_BTD, step) -> (y_BTD, None)``."""

    def __init__(self, dim: int, inter_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w_gate = Linear(dim, inter_dim, bias=bias)
        self.w_up = Linear(dim, inter_dim, bias=bias)
        self.w_down = Linear(inter_dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, None]:
        return self.mlp(x_BTD), None

    def mlp(self, x_BTD: Tensor) -> Tensor:
        """The product alone, for x of any leading dims (an MoE's shared experts use it)."""
        gate, up = each_of(x_BTD, self.w_gate, self.w_up)
        return self.w_down(silu(gate) * up)
