"""Greedy decoding with drafts of the model's own MTP module: fewer forwards, the same tokens.

DeepSeek-V3 (arXiv:2412.19437, section 5.4.3) reads its first MTP module as a draft model. The
module guesses the token after the next one; the next forward takes both, and where the model itself
would have written the guess, one forward has given two tokens. Where not, the guess is forgotten:
the cache is cut back, and what was written is the model's own choice all the same.

Shapes: B = 1 row, T new tokens, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.generate.memory import can_be_cut_back
from fathom.layers.base import require
from fathom.layers.cache import Cache
from fathom.layers.step import Step
from fathom.model import Decoder
from fathom.model.mtp import MTPModule


@dataclass(kw_only=True)
class Speculation:
    """What came of it.

    Args:
        tokens: what greedy decoding gives.
        forwards: of the model, the reading of the prompt not counted.
        drafts: guesses that were checked.
        accepted: those the model agreed with.
    """

    tokens: list[int] = field(default_factory=list)
    forwards: int = 0
    drafts: int = 0
    accepted: int = 0


class _Reader:
    """The model and its cache: new tokens in, hidden states and greedy choices out."""

    def __init__(self, model: Decoder, capacity: int) -> None:
        self.model = model
        self.cache = model.new_cache(1, capacity)

    def read(self, tokens: Sequence[int]) -> tuple[Tensor, list[int]]:
        """States ``[1, T, D]`` as the MTP module wants them, and the likeliest next tokens."""
        tokens_BT = torch.tensor([list(tokens)], device=self.model.embed.weight.device)
        step = Step.cached(tokens_BT, self.cache)
        hidden = self.model.hidden(tokens_BT, step, self.cache)
        self.cache.length = step.total
        after_norm = self.model.cfg.mtp is not None and self.model.cfg.mtp.post_norm_hidden
        states_BTD = hidden.states_BTD if after_norm else hidden.before_norm_BTD
        return states_BTD, self.model.logits(hidden.states_BTD)[0].argmax(-1).tolist()


class _Drafter:
    """The first MTP module with a cache of its own."""

    def __init__(self, model: Decoder, capacity: int) -> None:
        self.model = model
        module = model.mtp[0]
        assert isinstance(module, MTPModule)
        self.module = module
        weight = model.embed.weight
        self.cache = Cache(
            [model.cfg.groups[-1].attention.streams()],
            batch_size=1,
            capacity=capacity,
            device=weight.device,
            dtype=weight.dtype,
        )

    def guess(self, states_BTD: Tensor, following: Sequence[int]) -> int:
        """The token two places after the last state; ``following[i]`` is the one after state i."""
        tokens_BT = torch.tensor([list(following)], device=states_BTD.device)
        step = Step.cached(tokens_BT, self.cache)
        embedded_BTD = self.model.embed(tokens_BT)
        output = self.module(embedded_BTD, states_BTD, step.at(self.cache.layers[0]))
        self.cache.length = step.total
        return int(self.model.logits(output.states_BTD[0, -1]).argmax())


@torch.inference_mode()
def speculate(model: Decoder, prompt: Sequence[int], max_new_tokens: int) -> Speculation:
    """Continue ``prompt`` greedily by ``max_new_tokens`` tokens.

    Raises:
        ValueError: the model has no MTP module, its cache cannot be cut back, or the text does not
            fit in its context.
    """
    check(model)
    total = len(prompt) + max_new_tokens
    require(
        len(prompt) > 0 and max_new_tokens > 0 and total <= model.cfg.max_seq_len,
        f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} must both be at "
        f"least 1 and together at most the model's context of {model.cfg.max_seq_len}",
    )
    reader, drafter = _Reader(model, total + 2), _Drafter(model, total + 2)
    states, choices = reader.read(prompt)
    token = choices[-1]
    draft = drafter.guess(states, [*prompt[1:], token])
    result = Speculation(tokens=[token])
    while len(result.tokens) < max_new_tokens:
        states, choices = reader.read([token, draft])
        result.forwards += 1
        result.drafts += 1
        right = choices[0] == draft
        result.accepted += right
        if not right:
            reader.cache.length -= 1
            states, choices = states[:, :1], choices[:1]
        result.tokens += choices
        token = choices[-1]
        draft = drafter.guess(states, choices)
    del result.tokens[max_new_tokens:]
    return result


def check(model: Decoder) -> None:
    """Refuse a model that cannot draft, or whose cache cannot forget a token."""
    require(len(model.mtp) > 0, "this model has no MTP module to draft with")
    require(
        can_be_cut_back(model),
        "speculative decoding must be able to take a token back, and a windowed cache, or one with "
        "entries of several tokens, cannot",
    )
