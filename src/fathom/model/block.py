"""One layer: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

Shapes: B batch, T new tokens, D model dim.
"""

from typing import NamedTuple

from torch import Tensor, nn

from fathom.attention import Indexing
from fathom.config import LayerGroup
from fathom.ffn import Routing
from fathom.layers.norm import RMSNorm
from fathom.layers.step import Step


class BlockOutput(NamedTuple):
    """The residual, and what the experts and the indexer say, where there are any."""

    x_BTD: Tensor
    routing: Routing | None
    indexing: Indexing | None


class Block(nn.Module):
    """Pre-norm residual block of one layer group."""

    def __init__(self, group: LayerGroup, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = group.attention.build(dim)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.ffn = group.ffn.build(dim)

    def forward(self, x_BTD: Tensor, step: Step) -> BlockOutput:
        mixed_BTD, indexing = self.attention.attend(self.attention_norm(x_BTD), step)
        x_BTD = x_BTD + mixed_BTD
        y_BTD, routing = self.ffn(self.ffn_norm(x_BTD), step)
        return BlockOutput(x_BTD + y_BTD, routing, indexing)
