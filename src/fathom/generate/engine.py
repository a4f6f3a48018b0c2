"""The engine: prompts in, text out, one cached token at a time.

Each prompt is read into its own row of the cache; then all rows decode together, each at its own
position. What a row gets depends on its prompt, its place in the list and the seed alone.

Shapes: B prompts, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Unpack

import torch
from torch import Tensor

from fathom.convert.run_folder import CheckpointError
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.generate.defaults import Settings, check, length, over, read_defaults, sampling
from fathom.generate.memory import Memory
from fathom.generate.sample import (
    Said,
    Sampling,
    TokenLogprob,
    adjusted,
    next_tokens,
    token_logprobs,
)
from fathom.generate.text import GrowingText
from fathom.layers.base import require
from fathom.layers.cache import Cache
from fathom.model import Decoder

PREFILL_CHUNK = 512  # prompt tokens per forward: bounds the mask and the logits
MAX_TOP_LOGPROBS = 20
BUNDLED_BY_SIZE = {1024: "1k", 4096: "4k"}
FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What came after one prompt.

    Args:
        text: decoded, up to a stop string; empty without a tokenizer.
        tokens: all generated ids, an end-of-text id included.
        finish_reason: the end-of-text token, a stop string, or ``max_new_tokens``.
        logprobs: of each token, where ``top_logprobs`` asked for them.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Row:
    """One prompt and what came after it so far."""

    prompt: list[int]
    text: GrowingText | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token_id: int, eos_ids: Collection[int]) -> str:
        """Take a token in; returns the text that became certain."""
        self.tokens.append(token_id)
        piece = ""
        if token_id in eos_ids:
            self.finish_reason = "eos"
        elif self.text is not None:
            piece = self.text.add(token_id)
            if self.text.stopped:
                self.finish_reason = "stop"
        return piece

    def result(self) -> Generation:
        text = "" if self.text is None else self.text.text
        reason = self.finish_reason or "length"
        return Generation(text, self.tokens, reason, self.logprobs or None)


def tokenizer_of(model: Decoder) -> Tokenizer | None:
    """The tokenizer that was loaded with a model, else the bundled one of its vocabulary size.

    None: there is neither, or the model is another project's, whose ids are not ours.
    """
    if (loaded := getattr(model, "tokenizer", None)) is not None:
        assert isinstance(loaded, Tokenizer)
        return loaded
    if getattr(model, "origin", None) is not None:
        return None
    name = BUNDLED_BY_SIZE.get(model.cfg.vocab_size)
    return None if name is None else Tokenizer.load(BUNDLED / f"tokenizer-{name}.json")


def missing_tokenizer(model: Decoder) -> ValueError:
    """What to raise where text meets a model without a tokenizer."""
    if reason := getattr(model, "no_tokenizer", ""):
        return CheckpointError(f"text needs a tokenizer: {reason}")
    return ValueError(
        f"text needs a tokenizer, and none came with this model (of {model.cfg.vocab_size} ids): "
        "give token ids, or Engine(model, tokenizer)"
    )


def defaults_of(model: Decoder) -> Settings:
    """What the checkpoint says that a model was loaded from.

    Raises:
        CheckpointError: its ``generation_config.json`` cannot be used.
    """
    origin = getattr(model, "origin", None)
    if origin is None:
        return {}
    return read_defaults(origin.files, origin.config, "the checkpoint")


class Engine:
    """Generates with one model on the device where it lies.

    Args:
        model: a decoder, as ``fathom.load`` or ``fathom.build`` give it.
        tokenizer: None: the one that came with the model, or the bundled one of its vocabulary
            size; where there is neither, prompts are token ids.
        defaults: for what a request does not say, before those that came with the model.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        defaults: Settings | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer or tokenizer_of(model)
        self.defaults = over(defaults or {}, defaults_of(model))
        if self.tokenizer is not None:
            known, made = self.tokenizer.vocab_size, model.cfg.vocab_size
            require(
                known <= made,
                f"the tokenizer has {known} ids and the model only {made}: it is not this model's",
            )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        seed: int | Sequence[int] = 0,
        top_logprobs: int | None = None,
        stop: Sequence[str] = (),
        symbols: bool = False,
        stream: Callable[[int, str], None] | None = None,
        memory: Memory | None = None,
        **request: Unpack[Settings],
    ) -> list[Generation]:
        """Continue each prompt, at most ``max_new_tokens`` tokens or to the end of its text.

        Args:
            prompts: texts (begun as the tokenizer begins one) or token ids (taken as they are).
            seed: one for all prompts, each of which draws on its own; or one for each prompt,
                which then draws as it would alone.
            top_logprobs: give log-probabilities too, also of so many of the likeliest tokens.
            stop: strings that end a text; they are not part of it.
            symbols: let the model write image ids too; else they are never chosen.
            stream: called with a prompt's place and each piece of its text, as soon as it is sure.
            memory: of a conversation: what it holds of the only prompt is not read again.
            request: see :class:`Settings`; what is not said or None is the engine's default, at
                last greedy and 64 tokens.

        Raises:
            ValueError: a prompt or setting that cannot be; the sentence says what is allowed.
            RuntimeError: the model's logits are not numbers.
        """
        settings = over(request, self.defaults)
        generators = self._generators(seed, len(prompts))
        check(settings)
        how, longest = sampling(settings), length(settings)
        _check_top_logprobs(top_logprobs)
        rows = self._rows(prompts, stop)
        if not rows:
            return []
        starts_B = self._starts(rows)
        cache = self._cache(rows, longest, memory)
        eos_ids = self._eos_ids(settings)
        barred_V = self._barred(eos_ids, symbols=symbols)
        said = self._said(rows, how)
        logits_BV = self._prefill(rows, cache)
        if memory is not None:
            memory.ids = list(rows[0].prompt)
        for left in reversed(range(longest)):
            allowed_BV = adjusted(logits_BV, how, said).masked_fill(barred_V, -torch.inf)
            tokens_B = next_tokens(allowed_BV, how, generators)
            if top_logprobs is not None:
                _note(rows, token_logprobs(logits_BV, tokens_B, top_logprobs))
            self._take(rows, tokens_B.tolist(), eos_ids, stream)
            if left == 0 or all(row.finish_reason for row in rows):
                break
            if said is not None:
                said.add(tokens_B)
            logits_BV = self.model(tokens_B[:, None], cache=cache, starts_B=starts_B)[:, -1]
            starts_B = None if starts_B is None else starts_B + 1
            if memory is not None:
                memory.ids += tokens_B.tolist()
        self._finish(rows, stream)
        return [row.result() for row in rows]

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    def _rows(self, prompts: Sequence[str | Sequence[int]], stop: Sequence[str]) -> list[Row]:
        wants_list = f"prompts must be a list of prompts, got the text {prompts!r}: write [text]"
        require(not isinstance(prompts, str), wants_list)
        require(not isinstance(stop, str), f"stop must be a list of strings, got {stop!r}")
        require("" not in stop, "a stop string must not be empty: it would end every text at once")
        tokenizer = self.tokenizer
        require(tokenizer is not None or not stop, "stop strings need a tokenizer")
        return [
            Row(self._ids(prompt), None if tokenizer is None else GrowingText(tokenizer, stop))
            for prompt in prompts
        ]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise missing_tokenizer(self.model)
            ids = [*self.tokenizer.begin_ids, *self.tokenizer.encode(prompt)]
            return ids or [self.tokenizer.bos_id]  # something must stand before the first token
        ids = list(prompt)
        require(len(ids) >= 1, "a prompt of token ids must hold at least one")
        wrong = [i for i in ids if not 0 <= i < self.model.cfg.vocab_size]
        require(
            not wrong,
            f"token ids must be from 0 to {self.model.cfg.vocab_size - 1}, got {wrong[:1]}",
        )
        return ids

    def _cache(self, rows: list[Row], max_new_tokens: int, memory: Memory | None) -> Cache:
        """Room for every row; what a memory knows of the only one is in it."""
        longest, context = max(len(row.prompt) for row in rows), self.model.cfg.max_seq_len
        require(
            longest + max_new_tokens <= context,
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit in the "
            f"model's context of {context} (max_seq_len): shorten one of them",
        )
        if memory is None:
            return self.model.new_cache(len(rows), longest + max_new_tokens)
        require(len(rows) == 1, f"a memory is of one conversation, got {len(rows)} prompts")
        return memory.recall(self.model, rows[0].prompt, longest + max_new_tokens)

    def _starts(self, rows: list[Row]) -> Tensor | None:
        """The position behind each prompt, ``[B]``; None where it is the same for all."""
        lengths = [len(row.prompt) for row in rows]
        return torch.tensor(lengths, device=self._device) if len(set(lengths)) > 1 else None

    def _generators(self, seed: int | Sequence[int], n_prompts: int) -> list[torch.Generator]:
        """A stream of draws of its own for each prompt."""
        seeds = [seed] * n_prompts if isinstance(seed, int) else list(seed)
        require(
            len(seeds) == n_prompts,
            f"seed must be one number, or one for each of {n_prompts} prompts, got {len(seeds)}",
        )
        for each in seeds:
            Sampling(seed=each)  # checks it
        places = range(n_prompts) if isinstance(seed, int) else [0] * n_prompts
        return [
            torch.Generator(self._device).manual_seed((each * 1_000_003 + place) % 2**63)
            for each, place in zip(seeds, places, strict=True)
        ]

    def _eos_ids(self, settings: Settings) -> Collection[int]:
        """The ids that end a text: those the settings name, else the tokenizer's."""
        if (said := settings.get("eos_ids")) is not None:
            return said
        return () if self.tokenizer is None else (self.tokenizer.eos_id,)

    def _said(self, rows: list[Row], how: Sampling) -> Said | None:
        if not how.penalises:
            return None
        prompts = [row.prompt for row in rows]
        return Said(prompts, self.model.cfg.vocab_size, self._device)

    def _barred(self, eos_ids: Collection[int], *, symbols: bool) -> Tensor:
        """bool ``[V]``: ids no text holds (image ids, begin of text, ids without meaning)."""
        barred_V = torch.zeros(self.model.cfg.vocab_size, dtype=torch.bool)
        if self.tokenizer is not None:
            if self.tokenizer.bos_id not in eos_ids:  # some vocabularies have one for both
                barred_V[self.tokenizer.bos_id] = True
            barred_V[self.tokenizer.vocab_size :] = True
            if not symbols:
                barred_V[self.tokenizer.text_vocab_size :] = True
        return barred_V.to(self._device)

    def _prefill(self, rows: list[Row], cache: Cache) -> Tensor:
        """Read what is new of each prompt into its row of the cache; what follows, ``[B, V]``."""
        last, known = [], cache.length
        for place, row in enumerate(rows):
            part, logits_1TV = cache.rows(place, place + 1), None
            part.length = known
            tokens_1T = torch.tensor([row.prompt[known:]], device=self._device)
            for chunk_1T in tokens_1T.split(PREFILL_CHUNK, dim=1):
                logits_1TV = self.model(chunk_1T, cache=part)
            assert logits_1TV is not None
            last.append(logits_1TV[:, -1])
            cache.length = max(cache.length, part.length)
        return torch.cat(last)

    def _take(
        self,
        rows: list[Row],
        tokens: list[int],
        eos_ids: Collection[int],
        stream: Callable[[int, str], None] | None,
    ) -> None:
        for place, (row, token_id) in enumerate(zip(rows, tokens, strict=True)):
            if row.finish_reason is None:
                piece = row.add(token_id, eos_ids)
                if piece and stream is not None:
                    stream(place, piece)

    def _finish(self, rows: list[Row], stream: Callable[[int, str], None] | None) -> None:
        """Give out what was held back."""
        for place, row in enumerate(rows):
            piece = "" if row.text is None else row.text.finish()
            if piece and stream is not None:
                stream(place, piece)


def _check_top_logprobs(top: int | None) -> None:
    require(
        top is None or 0 <= top <= MAX_TOP_LOGPROBS,
        f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, got {top}",
    )


def _note(rows: list[Row], logprobs: list[TokenLogprob]) -> None:
    """Keep the log-probabilities of the rows that still go on."""
    for row, logprob in zip(rows, logprobs, strict=True):
        if row.finish_reason is None:
            row.logprobs.append(logprob)
