"""The interface of an attention: a config that counts, and a module with one forward.

Shapes: B batch, T new tokens, S all tokens so far, D model dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.layers.base import Config
from fathom.layers.cache import Stream
from fathom.layers.rope import Rope
from fathom.layers.step import Step
from fathom.ops.attention import attention
from fathom.ops.packed_attention import PACKED_ATTENTION, packed_attention
from fathom.ops.registry import autocast, choose


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

    def prepare(self, step: Step) -> None:
        """Make what the layers of a step share, before any of them runs as a compiled region."""
        rope = getattr(self, "rope", None)
        if isinstance(rope, Rope):
            step.angles(rope)

    def set_progress(self, progress: float) -> Hashable:
        """Training has come so far, from 0 to 1: for what follows a schedule. Nothing does here.

        Returns what of the schedule holds now: a forward is the same as long as it is equal.
        """
        return None

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


def attend_visible(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    step: Step,
    keys_BS: Tensor | None,
    *,
    scale: float,
    window_size: int | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention to all that the step lets a query see, ``[B, T, H, V]``.

    Without a cache documents and windows need no mask where :func:`packed_attention` has a kernel.
    The arguments are those of :func:`attention` and of :meth:`Step.mask`.
    """
    unequal = step.cu_seqlens is not None or window_size is not None
    if unequal and keys_BS is None and slopes_H is None:
        q, k, v = autocast(q_BTHQ, k_BSGQ, v_BSGV)
        if choose(PACKED_ATTENTION, "auto", q, k, v) != "reference":
            return packed_attention(q, k, v, step.borders(), scale=scale, window_size=window_size)
    mask = step.mask(keys_BS, window_size=window_size, slopes_H=slopes_H, dtype=q_BTHQ.dtype)
    return attention(q_BTHQ, k_BSGQ, v_BSGV, scale=scale, mask=mask, causal=mask is None)


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
