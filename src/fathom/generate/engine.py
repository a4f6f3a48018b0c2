"""The engine: prompts in, text out, one cached token at a time.

Each prompt is read into its own row of the cache; then all rows decode together, each at its own
position. What a row gets depends on its prompt, its place in the list and the seed alone.

Shapes: B prompts, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.generate.sample import Sampling, next_tokens
from fathom.generate.text import GrowingText
from fathom.layers.base import require
from fathom.layers.cache import Cache
from fathom.model import Decoder

PREFILL_CHUNK = 512  # prompt tokens per forward: bounds the mask and the logits
BUNDLED_BY_SIZE = {1024: "1k", 4096: "4k"}
FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What came after one prompt.

    Args:
        text: decoded, up to a stop string; empty without a tokenizer.
        tokens: all generated ids, an end-of-text id included.
        finish_reason: the end-of-text token, a stop string, or ``max_new_tokens``.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason


@dataclass
class Row:
    """One prompt and what came after it so far."""

    prompt: list[int]
    text: GrowingText | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token_id: int, eos_id: int | None) -> str:
        """Take a token in; returns the text that became certain."""
        self.tokens.append(token_id)
        piece = ""
        if token_id == eos_id:
            self.finish_reason = "eos"
        elif self.text is not None:
            piece = self.text.add(token_id)
            if self.text.stopped:
                self.finish_reason = "stop"
        return piece

    def result(self) -> Generation:
        text = "" if self.text is None else self.text.text
        return Generation(text, self.tokens, self.finish_reason or "length")


def tokenizer_of(model: Decoder) -> Tokenizer | None:
    """The tokenizer that was loaded with a model, else the bundled one of its vocabulary size."""
    if (loaded := getattr(model, "tokenizer", None)) is not None:
        assert isinstance(loaded, Tokenizer)
        return loaded
    name = BUNDLED_BY_SIZE.get(model.cfg.vocab_size)
    return None if name is None else Tokenizer.load(BUNDLED / f"tokenizer-{name}.json")


class Engine:
    """Generates with one model on the device where it lies.

    Args:
        model: a decoder, as ``fathom.load`` or ``fathom.build`` give it.
        tokenizer: None: the one that came with the model, or the bundled one of its vocabulary
            size; where there is neither, prompts are token ids and nothing ends a text early.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer or tokenizer_of(model)
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
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        symbols: bool = False,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continue each prompt, at most ``max_new_tokens`` tokens or to the end of its text.

        Args:
            prompts: texts (begun with the begin-of-text token) or token ids (taken as they are).
            temperature, top_k, top_p, min_p, seed: see :class:`Sampling`; 0 is greedy.
            stop: strings that end a text; they are not part of it.
            symbols: let the model write image ids too; else they are never chosen.
            stream: called with a prompt's place and each piece of its text, as soon as it is sure.

        Raises:
            ValueError: a prompt or setting that cannot be; the sentence says what is allowed.
            RuntimeError: the model's logits are not numbers.
        """
        how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}")
        rows = self._rows(prompts, stop)
        if not rows:
            return []
        starts_B = torch.tensor([len(row.prompt) for row in rows], device=self._device)
        cache = self._new_cache(rows, max_new_tokens)
        generators = [self._generator(seed, place) for place in range(len(rows))]
        barred_V = self._barred(symbols=symbols)
        logits_BV = self._prefill(rows, cache)
        for left in reversed(range(max_new_tokens)):
            allowed_BV = logits_BV.masked_fill(barred_V, -torch.inf)
            tokens_B = next_tokens(allowed_BV, how, generators)
            self._take(rows, tokens_B.tolist(), stream)
            if left == 0 or all(row.finish_reason for row in rows):
                break
            logits_BV = self.model(tokens_B[:, None], cache=cache, starts_B=starts_B)[:, -1]
            starts_B = starts_B + 1
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
            size = self.model.cfg.vocab_size
            if self.tokenizer is None:
                raise ValueError(
                    f"a prompt of text needs a tokenizer, and none came with this model (of {size} "
                    "ids): give token ids, or Engine(model, tokenizer)"
                )
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        ids = list(prompt)
        require(len(ids) >= 1, "a prompt of token ids must hold at least one")
        wrong = [i for i in ids if not 0 <= i < self.model.cfg.vocab_size]
        require(
            not wrong,
            f"token ids must be from 0 to {self.model.cfg.vocab_size - 1}, got {wrong[:1]}",
        )
        return ids

    def _new_cache(self, rows: list[Row], max_new_tokens: int) -> Cache:
        longest, context = max(len(row.prompt) for row in rows), self.model.cfg.max_seq_len
        require(
            longest + max_new_tokens <= context,
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit in the "
            f"model's context of {context} (max_seq_len): shorten one of them",
        )
        return self.model.new_cache(len(rows), longest + max_new_tokens)

    def _generator(self, seed: int, place: int) -> torch.Generator:
        """A stream of its own for each prompt."""
        return torch.Generator(self._device).manual_seed((seed * 1_000_003 + place) % 2**63)

    def _barred(self, *, symbols: bool) -> Tensor:
        """bool ``[V]``: ids no text holds (image ids, begin of text, ids without meaning)."""
        barred_V = torch.zeros(self.model.cfg.vocab_size, dtype=torch.bool)
        if self.tokenizer is not None:
            barred_V[self.tokenizer.bos_id] = True
            barred_V[self.tokenizer.vocab_size :] = True
            if not symbols:
                barred_V[self.tokenizer.text_vocab_size :] = True
        return barred_V.to(self._device)

    def _prefill(self, rows: list[Row], cache: Cache) -> Tensor:
        """Read each prompt into its row of the cache; returns what follows them, ``[B, V]``."""
        last = []
        for place, row in enumerate(rows):
            part, logits_1TV = cache.rows(place, place + 1), None
            tokens_1T = torch.tensor([row.prompt], device=self._device)
            for chunk_1T in tokens_1T.split(PREFILL_CHUNK, dim=1):
                logits_1TV = self.model(chunk_1T, cache=part)
            assert logits_1TV is not None
            last.append(logits_1TV[:, -1])
            cache.length = max(cache.length, part.length)
        return torch.cat(last)

    def _take(
        self, rows: list[Row], tokens: list[int], stream: Callable[[int, str], None] | None
    ) -> None:
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        for place, (row, token_id) in enumerate(zip(rows, tokens, strict=True)):
            if row.finish_reason is None:
                piece = row.add(token_id, eos_id)
                if piece and stream is not None:
                    stream(place, piece)

    def _finish(self, rows: list[Row], stream: Callable[[int, str], None] | None) -> None:
        """Give out what was held back."""
        for place, row in enumerate(rows):
            piece = "" if row.text is None else row.text.finish()
            if piece and stream is not None:
                stream(place, piece)
