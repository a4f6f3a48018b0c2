"""From logits to the next token: penalties, temperature, top-k, top-p, min-p. Pure functions.

First what was said so far changes the logits, then the temperature divides them, then the filters
follow each other, each on what the one before left, so that top-p of the renormalised rest is
meant.

Repetition penalty: CTRL, arXiv:1909.05858, section 4.1, as transformers and vLLM apply it.
Presence and frequency penalties: as the OpenAI API defines them.

Shapes: B batch, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.layers.base import Config, require


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; None: all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p, at least one; None:
            all.
        min_p: keep tokens at least ``min_p`` times as likely as the likeliest; None: all.
        repetition_penalty: divides a positive logit, and multiplies a negative one, of every token
            that stands in the prompt or was generated; 1: none.
        presence_penalty: taken off the logit of every token that was generated.
        frequency_penalty: the same, once for each time it was generated.
        logit_bias: added to the logits of these ids.
        seed: of the random draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < float("inf"),
            f"temperature must be at least 0 and finite, got {self.temperature}",
        )
        require(
            self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}"
        )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name} must be from 0 to 1, got {value}")
        require(
            0 < self.repetition_penalty < float("inf"),
            f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-100 <= value <= 100, f"{name} must be from -100 to 100, got {value}")
        for token_id, bias in self.logit_bias.items():
            require(token_id >= 0, f"logit_bias must name ids from 0 on, got {token_id}")
            require(-100 <= bias <= 100, f"logit_bias must be from -100 to 100, got {bias}")
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on what was said so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Said:
    """Which tokens each row holds: bool ``prompt_BV``, int32 ``counts_BV`` of the generated."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device):
        self.prompt_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        for row_V, ids in zip(self.prompt_BV, prompts, strict=True):
            row_V[list(ids)] = True
        self.prompt_BV = self.prompt_BV.to(device)
        self.counts_BV = torch.zeros_like(self.prompt_BV, dtype=torch.int32)

    def add(self, tokens_B: Tensor) -> None:
        """Count the token that each row generated."""
        rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
        self.counts_BV[rows_B, tokens_B] += 1


def adjusted(logits_BV: Tensor, sampling: Sampling, said: Said | None = None) -> Tensor:
    """float32 logits after ``logit_bias`` and the penalties for what was ``said``.

    Raises:
        ValueError: ``logit_bias`` names an id that the model does not have.
    """
    logits_BV = logits_BV.float()
    if sampling.penalises:
        assert said is not None
        generated_BV = said.counts_BV > 0
        weaker_BV = torch.where(
            logits_BV > 0,
            logits_BV / sampling.repetition_penalty,
            logits_BV * sampling.repetition_penalty,
        )
        logits_BV = torch.where(said.prompt_BV | generated_BV, weaker_BV, logits_BV)
        logits_BV = logits_BV - sampling.presence_penalty * generated_BV
        logits_BV = logits_BV - sampling.frequency_penalty * said.counts_BV
    if not sampling.logit_bias:
        return logits_BV
    ids, size = list(sampling.logit_bias), logits_BV.shape[-1]
    require(max(ids) < size, f"logit_bias must name ids from 0 to {size - 1}, got {max(ids)}")
    bias_V = torch.zeros(size)
    bias_V[ids] = torch.tensor(list(sampling.logit_bias.values()))
    return logits_BV + bias_V.to(logits_BV.device)


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
    if p == 1:  # a sum of float32 may reach 1 before the last token
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    reached_BV = sorted_BV.softmax(-1).cumsum(-1)
    surplus_BV = torch.zeros_like(reached_BV, dtype=torch.bool)
    surplus_BV[:, 1:] = reached_BV[:, :-1] >= p
    dropped_BV = torch.zeros_like(surplus_BV).scatter(-1, order_BV, surplus_BV)
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


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself found a token, before any setting of ``Sampling``.

    Args:
        token_id: the token that was chosen.
        logprob: its natural logarithm of probability.
        top: the likeliest tokens and theirs, likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits_BV: Tensor, tokens_B: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of the chosen tokens and of the ``top`` likeliest, row by row."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    chosen = logprobs_BV.gather(-1, tokens_B[:, None])[:, 0].tolist()
    best = logprobs_BV.topk(min(top, logits_BV.shape[-1]), dim=-1)
    rows = zip(tokens_B.tolist(), chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id, logprob, list(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in rows
    ]
