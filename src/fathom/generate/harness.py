"""A model of ours in EleutherAI's lm-evaluation-harness (the extra ``eval``).

    from lm_eval import simple_evaluate
    from fathom.generate.harness import FathomLM
    simple_evaluate(model=FathomLM("runs/tiny"), tasks=[...])

Only this module imports the harness, so that nothing else needs it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fathom.generate.engine import Engine, missing_tokenizer
from fathom.layers.base import require
from fathom.model import Decoder

if TYPE_CHECKING:

    class LM:
        """What pyright is told where the harness is not installed."""
else:
    from lm_eval.api.model import LM

MAX_NEW_TOKENS = 256  # the harness's own default
Row = tuple[list[int], int]  # token ids, and how many of the last are scored


class FathomLM(LM):
    """The three questions of the harness, answered by one model.

    Args:
        model: a decoder, or what ``fathom.load`` takes.
        batch_size: rows a forward.
    """

    def __init__(self, model: Decoder | str | Path, *, batch_size: int = 8) -> None:
        from fathom import api

        super().__init__()
        self.model = model if isinstance(model, Decoder) else api.load(model)
        self.model.eval()
        self.engine, self.batch_size = Engine(self.model), batch_size
        if self.engine.tokenizer is None:
            raise missing_tokenizer(self.model)
        self.tokenizer = self.engine.tokenizer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): ln p of the second, and whether greedy would say it."""
        return self.score([self._row(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each text: ln p of all of it, each token seen with as much context as fits."""
        found = []
        for (text,) in (request.args for request in requests):
            rows = list(windows(self._begin(), self.tokenizer.encode(text), self._context))
            found.append(sum(logprob for logprob, _ in self.score(rows)))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each (context, settings): what comes next, up to one of ``until``."""
        return [self._generated(*request.args) for request in requests]

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """Sum of ln p of the last ids of each row, and whether each of them is the likeliest."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # alike ones together
        found: dict[int, tuple[float, bool]] = {}
        for at in range(0, len(order), self.batch_size):
            places = order[at : at + self.batch_size]
            longest = max(len(rows[place][0]) for place in places)
            padded = [[*ids, *[0] * (longest - len(ids))] for ids, _ in (rows[p] for p in places)]
            tokens_BT = torch.tensor(padded, device=self.model.embed.weight.device)
            logits_BTV = self.model(tokens_BT[:, :-1])
            for place, row_T, logits_TV in zip(places, tokens_BT, logits_BTV, strict=True):
                ids, scored = rows[place]
                end = len(ids) - 1
                targets = row_T[end + 1 - scored : end + 1]
                logprobs = logits_TV[end - scored : end].float().log_softmax(-1)
                chosen = logprobs.gather(-1, targets[:, None]).sum().item()
                found[place] = (chosen, bool((logprobs.argmax(-1) == targets).all()))
        return [found[place] for place in range(len(rows))]

    @property
    def _context(self) -> int:
        return self.model.cfg.max_seq_len

    def _begin(self) -> list[int]:
        """What stands before a text of which the first token is scored too."""
        return self.tokenizer.begin_ids or [self.tokenizer.eos_id]

    def _row(self, context: str, continuation: str) -> Row:
        """Spaces between the two belong to the second, as the tokens do that hold both."""
        kept = context.rstrip()
        before = self.tokenizer.encode(kept)
        whole = self.tokenizer.encode(context + continuation)
        scored = len(whole) - len(before)
        require(scored > 0, f"a continuation must hold a token, got {continuation!r}")
        begin = self.tokenizer.begin_ids if before else self._begin()
        require(scored <= self._context, f"a continuation of {scored} tokens is too long")
        return [*begin, *whole][-(self._context + 1) :], scored

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until", [])
        stop = [until] if isinstance(until, str) else [s for s in until if s]
        length = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        length = min(length, self._context - 1)
        ids = [*self._begin(), *self.tokenizer.encode(context)][-(self._context - length) :]
        sampled = bool(settings.get("do_sample", False))
        temperature = float(settings.get("temperature", 1.0)) if sampled else 0.0
        top_p = settings.get("top_p") if sampled else None
        (result,) = self.engine.generate(
            [ids], max_new_tokens=length, temperature=temperature, top_p=top_p, stop=stop
        )
        return result.text


def windows(begin: list[int], ids: list[int], context: int) -> Iterator[Row]:
    """Rows of at most ``context`` + 1 ids in which each id is scored once, the last with most."""
    first = min(context - len(begin) + 1, len(ids))
    if ids:
        yield [*begin, *ids[:first]], first
    for at in range(first, len(ids), context):
        end = min(at + context, len(ids))
        yield ids[end - context - 1 : end], end - at
