"""The interface of an attention: a config that counts, and a module with one forward.

Shapes: B batch, T new tokens, S all tokens so far, D model dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.layers.base import Config
from fathom.layers.cache import Stream
from fathom.layers.rope import Rope
from fathom.layers.step import Step


class Selection(NamedTuple):
    """The blocks of keys that each query reads, as ``ops.block_attention`` takes them."""

    starts_BTIN: Tensor  # int32, the first key of a block; -1: none
    block_size: int


class Indexing(NamedTuple):
    """What an attention with an indexer says beside its output. Returned, never stored.

    Args:
        loss: what trains the indexer, a weighted scalar; None: nothing is to be trained.
        selected_BTN: the tokens that each query read, for layers above to share; None: all.
    """

    loss: Tensor | None
    selected_BTN: Tensor | None


class Attention(nn.Module, ABC):
    """``forward(x_BTD, step) -> [B, T, D]``, the output projection included."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, step: Step) -> Tensor: ...

    def set_progress(self, progress: float) -> None:
        """Training has come so far, from 0 to 1: for what follows a schedule. Nothing does here."""

    def selection(self, x_BTD: Tensor, step: Step) -> Selection | None:
        """Which blocks a sparse attention selects, for probes. None: it reads all it may see."""
        return None

    def attend(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Indexing | None]:
        """What a block calls: ``forward``, and what an indexer says (None: there is none)."""
        return self(x_BTD, step), None

    def scores(self, x_BTD: Tensor, step: Step) -> Tensor | None:
        """Scores before the softmax, ``[B, H, T, S]``, ``-inf`` where nothing may be seen.

        A sparse attention gives those of every key that it could have selected.

        For probes that look, not for speed. None: this attention has no such scores.
        """
        return None

    def position_keys(self, x_BTD: Tensor) -> tuple[Tensor, Rope] | None:
        """Keys ``[B, T, G, R]`` before they are rotated, and the rotation; None: none rotates."""
        return None


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


def raw_scores(q_BTHQ: Tensor, k_BSGQ: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """``scale q . k`` with what ``mask`` hides at ``-inf`` (None: the future), float32.

    Head j reads key head ``j // (H / G)``; ``mask`` is bool or additive, as of :meth:`Step.mask`.
    """
    k_BSHQ = k_BSGQ.repeat_interleave(q_BTHQ.shape[2] // k_BSGQ.shape[2], dim=2)
    scores = scale * torch.einsum("bthq,bshq->bhts", q_BTHQ.float(), k_BSHQ.float())
    if mask is None:
        n_queries, n_keys = scores.shape[-2:]
        ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device)
        mask = ones.tril(n_keys - n_queries)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask
