"""The interface of an FFN: a config that counts, and a module with one forward.

Shapes: B batch, T tokens, D model dim, E experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from fathom.layers.base import Config, require
from fathom.layers.step import Step

MAX_INTER_DIM = 2**20


class Routing(NamedTuple):
    """What one MoE layer says about one forward. Returned, never stored: recomputation is safe.

    Args:
        balance_loss: scalar float32 (float64 in a float64 model), already weighted; added to the
            loss.
        tokens_per_expert: int64 ``[E]``, how many (token, choice) pairs each expert got.
        entropy: scalar float32, mean over tokens of the entropy of the normalised scores (nats).
        reach: float32 ``[2]``, ranks and nodes on which a token has experts, mean over tokens;
            None: all experts are here.
    """

    balance_loss: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor
    reach: Tensor | None = None


class FFN(nn.Module, ABC):
    """``forward(x_BTD, step) -> ([B, T, D], Routing or None)``; None: nothing is routed."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Routing | None]: ...


@dataclass(frozen=True, kw_only=True)
class FFNConfig(Config, ABC):
    """What every FFN's config answers, from its numbers alone."""

    @abstractmethod
    def build(self, dim: int) -> FFN:
        """The module for a residual width of ``dim``."""

    @abstractmethod
    def num_params(self, dim: int) -> int:
        """All weights and biases (routing-only bias buffers excluded)."""

    @abstractmethod
    def num_active_params(self, dim: int) -> int:
        """Those that one token reads."""

    @abstractmethod
    def flops_per_token(self, dim: int) -> int:
        """Forward FLOPs per token (2 per multiply-add)."""


def require_inter_dim(inter_dim: int) -> None:
    """Refuse an inner width below 1, or one that only a damaged file would ask for."""
    require(
        1 <= inter_dim <= MAX_INTER_DIM,
        f"inter_dim must be from 1 to {MAX_INTER_DIM}, got {inter_dim}",
    )
