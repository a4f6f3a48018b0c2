"""Keeping the experts evenly used: one small class per way, to be combined in a tuple.

With ``f_e = E / (K N) * tokens of e`` (what was chosen, not differentiated) and ``P_e`` the mean
normalised score (differentiated), the auxiliary loss is ``coeff * sum_e f_e P_e``: ``coeff`` when
all is even, more when the experts with high scores also get the tokens.

- ``aux_loss``: over all tokens of the micro-batch (DeepSeekMoE, arXiv:2401.06066, eq. 12); or with
  ``over = "step"`` with ``f`` of the optimizer step's tokens up to now (Qiu et al., "Demons in the
  Detail", arXiv:2501.11873): experts may then specialise within a micro-batch. Of all ranks always.
- ``seq_aux_loss``: per sequence, then the mean (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).
- ``aux_loss_free``: no loss; a bias steers the choice (arXiv:2408.15664, algorithm 1).
- ``z_loss``: keeps the logits small (ST-MoE, arXiv:2202.08906, eq. 5).

Shapes: N tokens, E experts, K chosen per token, B sequences, T tokens of a sequence.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Discriminator
from torch import Tensor

from fathom.ffn.router import Choice
from fathom.layers.base import Config, require

SumOverRanks = Callable[[Tensor], Tensor]


def alone(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Config, ABC):
    """``loss(choice, batch_size, total)``: what is added to the training loss, already weighted.

    Several ranks share a micro-batch of equal parts; the loss is the mean of what each returns.
    """

    @property
    def over_step(self) -> bool:
        """Whether ``total`` is to add the counts of the step's earlier micro-batches too."""
        return False

    @abstractmethod
    def loss(self, choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
        """A scalar in the router's dtype. The N tokens are ``batch_size`` rows of equal length.

        ``total`` adds up a tensor over all ranks, without a gradient.
        """


@dataclass(frozen=True, kw_only=True)
class NoBalance(BalanceConfig):
    """Nothing: the control."""

    kind: Literal["none"] = "none"

    def loss(self, choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
        return choice.scores_NE.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class AuxLoss(BalanceConfig):
    """``sum_e f_e P_e`` over the whole micro-batch.

    ``P`` is of the scores divided by their sum over the experts: of softmax scores themselves.

    Args:
        aux_loss_coeff: its weight.
        over: what ``f`` counts: the micro-batch, or the step up to and with it.
    """

    kind: Literal["aux_loss"] = "aux_loss"
    aux_loss_coeff: float = 0.001
    over: Literal["micro_batch", "step"] = "micro_batch"

    def __post_init__(self) -> None:
        _require_coeff("aux_loss_coeff", self.aux_loss_coeff)

    @property
    def over_step(self) -> bool:
        return self.over == "step"

    def loss(self, choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
        return self.aux_loss_coeff * sequence_loss(choice, 1, total)


@dataclass(frozen=True, kw_only=True)
class SeqAuxLoss(BalanceConfig):
    """The same within each row of the batch, then the mean over rows.

    ``f`` counts the experts that were really chosen (with bias and groups), as DeepSeek's code
    does; the paper's formula would choose again by the scores alone.
    """

    kind: Literal["seq_aux_loss"] = "seq_aux_loss"
    seq_aux_loss_coeff: float = 0.0001

    def __post_init__(self) -> None:
        _require_coeff("seq_aux_loss_coeff", self.seq_aux_loss_coeff)

    def loss(self, choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
        return self.seq_aux_loss_coeff * sequence_loss(choice, batch_size)


@dataclass(frozen=True, kw_only=True)
class AuxLossFree(BalanceConfig):
    """After each optimizer step ``b += u * sign(mean(c) - c)``; ``b`` is the router's bias."""

    kind: Literal["aux_loss_free"] = "aux_loss_free"
    bias_update_speed: float = 0.001

    def __post_init__(self) -> None:
        _require_coeff("bias_update_speed", self.bias_update_speed)

    def loss(self, choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
        return choice.scores_NE.new_zeros(())

    def bias_step(self, counts_E: Tensor) -> Tensor:
        """What to add to the bias, float32, after a step in which the experts got ``counts_E``."""
        behind_E = counts_E.sum() - counts_E * counts_E.shape[-1]  # exact: E * (mean - c)
        return self.bias_update_speed * behind_E.sign().float()


@dataclass(frozen=True, kw_only=True)
class ZLoss(BalanceConfig):
    """``mean over tokens of logsumexp(logits)**2``."""

    kind: Literal["z_loss"] = "z_loss"
    z_loss_coeff: float = 0.001

    def __post_init__(self) -> None:
        _require_coeff("z_loss_coeff", self.z_loss_coeff)

    def loss(self, choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
        squares_N = choice.logits_NE.logsumexp(-1).square()
        return self.z_loss_coeff * squares_N.sum() / max(squares_N.shape[0], 1)


AnyBalance = Annotated[
    NoBalance | AuxLoss | SeqAuxLoss | AuxLossFree | ZLoss, Discriminator("kind")
]


def _require_coeff(field: str, value: float) -> None:
    require(
        math.isfinite(value) and value >= 0,
        f"{field} must be a number of at least 0, got {value}: 0 switches it off",
    )


def normalised_scores(scores_NE: Tensor) -> Tensor:
    """Scores that sum to 1 over the experts (softmax scores already do)."""
    return scores_NE / scores_NE.sum(-1, keepdim=True).clamp_min(1e-20)


def sequence_loss(choice: Choice, batch_size: int, total: SumOverRanks = alone) -> Tensor:
    """``mean_b sum_e f_be P_be``, ``f`` and ``P`` of each of ``batch_size`` rows; 0 if empty.

    Through ``total``, ``f`` may be that of all ranks: the mean over ranks is then the loss of all.
    """
    n_tokens, n_experts = choice.scores_NE.shape
    if n_tokens == 0:
        return choice.scores_NE.sum()
    ids_BS = choice.expert_ids_NK.reshape(batch_size, -1)
    ones_BS = choice.scores_NE.new_ones(()).expand_as(ids_BS)
    counts_BE = choice.scores_NE.new_zeros(batch_size, n_experts).scatter_add(1, ids_BS, ones_BS)
    counts_BE = total(counts_BE)
    f_BE = counts_BE * (n_experts / counts_BE.sum(-1, keepdim=True))
    P_BE = normalised_scores(choice.scores_NE).view(batch_size, -1, n_experts).mean(1)
    return (f_BE * P_BE).sum(-1).mean()


def score_entropy(scores_NE: Tensor) -> Tensor:
    """Mean over tokens of the normalised scores' entropy, in nats, float32; 0 for no token."""
    p_NE = normalised_scores(scores_NE.detach())
    return (torch.special.entr(p_NE).sum() / max(p_NE.shape[0], 1)).float()


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio ``(max(c) - mean(c)) / mean(c)`` over the last dim, float32; 0 where all are 0."""
    mean = counts_E.double().mean(-1)
    return ((counts_E.amax(-1) - mean) / mean.clamp_min(1e-20)).float()


def dead_experts(counts_E: Tensor) -> Tensor:
    """How many experts of the last dim got no token, int64."""
    return (counts_E == 0).sum(-1)


def load_entropy(counts_E: Tensor) -> Tensor:
    """Entropy in nats of the experts' shares of the tokens, float32; ``log(E)`` when even."""
    share_E = counts_E.double() / counts_E.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share_E).sum(-1).float()
