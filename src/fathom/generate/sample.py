"""From logits to the next token: greedy, temperature, top-k, top-p, min-p. Pure functions.

The filters follow each other in this order, each on what the one before left, so that top-p of
the renormalised rest is meant.

Shapes: B batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.layers.base import Config, require


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; None: all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p; None: all.
        min_p: keep tokens at least ``min_p`` times as likely as the likeliest; None: all.
        seed: of the random draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < float("inf"),
            f"temperature must be at least 0 and finite, got {self.temperature}",
        )
        require(
            self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}"
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p must be above 0 and at most 1, got {self.top_p}",
        )
        require(
            self.min_p is None or 0 <= self.min_p <= 1,
            f"min_p must be from 0 to 1, got {self.min_p}",
        )
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, got {self.seed}")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What each token is drawn with, float32 ``[B, V]``; needs a temperature above 0."""
    assert sampling.temperature > 0
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV.softmax(-1)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """``-inf`` but for the k largest; those equal to the k-th all stay."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """``-inf`` but for the fewest likeliest tokens that reach ``p`` together, at least one."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    reached_BV = sorted_BV.softmax(-1).cumsum(-1)
    before_BV = torch.cat([torch.zeros_like(reached_BV[:, :1]), reached_BV[:, :-1]], dim=-1)
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
    dropped_BV = dropped_BV.scatter(-1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(dropped_BV, -torch.inf)


def keep_min_p(logits_BV: Tensor, min_p: float) -> Tensor:
    """``-inf`` for tokens less than ``min_p`` times as likely as the likeliest."""
    p_BV = logits_BV.softmax(-1)
    floor_B1 = min_p * p_BV.amax(-1, keepdim=True)
    return logits_BV.masked_fill(p_BV < floor_B1, -torch.inf)


def next_tokens(
    logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each row, int64 ``[B]``; a generator a row, so that rows are independent.

    Raises:
        RuntimeError: a row's logits are not numbers.
    """
    if logits_BV.isnan().any():
        raise RuntimeError("the model's logits are not numbers: its weights or inputs are damaged")
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    rows = zip(probabilities(logits_BV, sampling), generators, strict=True)
    return torch.cat([torch.multinomial(p_V, 1, generator=generator) for p_V, generator in rows])
