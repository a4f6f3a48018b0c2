"""How an attention learns about position: a config class each, chosen by ``kind``.

``rope`` turns queries and keys; ``decoupled_rope`` leaves them alone and adds a rotated part to the
score (as MLA does: arXiv:2405.04434, section 2.1.3); ``alibi`` adds a slope times the distance
(arXiv:2108.12409); ``none`` leaves only the causal mask.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Discriminator
from torch import Tensor

from fathom.layers.base import Config, require
from fathom.layers.rope import AnyScaling, Rope


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """Rotate the whole head (in MLA: its rope part)."""

    kind: Literal["rope"] = "rope"
    theta: float = 10000.0
    scaling: AnyScaling | None = None

    def __post_init__(self) -> None:
        require(self.theta > 1, f"position.theta must be above 1, got {self.theta}")

    def rope(self, dim: int) -> Rope:
        """The rotation of ``dim`` channels."""
        require(dim % 2 == 0, f"RoPE turns pairs of channels, so its width must be even, got {dim}")
        return Rope(dim, self.theta, self.scaling)


@dataclass(frozen=True, kw_only=True)
class DecoupledRopeConfig(RopeConfig):
    """Content does not turn; ``rope_head_dim`` further channels do, their keys shared by all heads.

    ``score = scale * (q_content . k_content + q_rope . k_rope)``: position is an added bias.
    """

    kind: Literal["decoupled_rope"] = "decoupled_rope"  # pyright: ignore
    rope_head_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rope_head_dim >= 2 and self.rope_head_dim % 2 == 0,
            f"position.rope_head_dim must be even and at least 2, got {self.rope_head_dim}",
        )


@dataclass(frozen=True, kw_only=True)
class AlibiConfig(Config):
    """A fixed slope per head times the distance, added to the score."""

    kind: Literal["alibi"] = "alibi"

    def slopes(self, n_heads: int) -> Tensor:
        """``2**(-8 i / n)``; between powers of two the paper interleaves."""
        power = 2 ** math.floor(math.log2(n_heads))
        first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
        rest = [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
        return torch.tensor(first + rest)


@dataclass(frozen=True, kw_only=True)
class NoPositionConfig(Config):
    """Nothing but the causal mask."""

    kind: Literal["none"] = "none"


AnyPosition = Annotated[
    RopeConfig | DecoupledRopeConfig | AlibiConfig | NoPositionConfig, Discriminator("kind")
]
