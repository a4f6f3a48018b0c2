"""The interface of an attention: a config that counts, and a module with one forward.

Shapes: B batch, T new tokens, S all tokens so far, D model dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fathom.layers.base import Config
from fathom.layers.cache import Stream
from fathom.layers.step import Step


class Attention(nn.Module, ABC):
    """``forward(x_BTD, step) -> [B, T, D]``, the output projection included."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, step: Step) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config, ABC):
    """What every config answers, from its numbers alone: nothing here makes a tensor."""

    @abstractmethod
    def build(self, dim: int) -> Attention:
        """The module for a residual width of ``dim``."""

    @abstractmethod
    def streams(self) -> Sequence[Stream]:
        """All that decoding must keep per token."""

    @abstractmethod
    def num_params(self, dim: int) -> int:
        """Weights, biases and norms."""

    @abstractmethod
    def projection_flops(self, dim: int) -> int:
        """Forward FLOPs per token that do not depend on the context (2 per multiply-add)."""

    @abstractmethod
    def core_flops(self, seq_len: int) -> int:
        """Forward FLOPs of one token's scores and mixing over ``seq_len`` keys."""
