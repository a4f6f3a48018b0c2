"""One layer: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

Shapes: B batch, T new tokens, D model dim.
"""

from torch import Tensor, nn

from fathom.config import LayerGroup
from fathom.ffn import Routing
from fathom.layers.norm import RMSNorm
from fathom.layers.step import Step


class Block(nn.Module):
    """Pre-norm residual block of one layer group."""

    def __init__(self, group: LayerGroup, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = group.attention.build(dim)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.ffn = group.ffn.build(dim)

    def forward(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), step)
        y_BTD, routing = self.ffn(self.ffn_norm(x_BTD), step)
        return x_BTD + y_BTD, routing
