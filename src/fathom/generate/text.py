"""The text of one generated row as it grows: whole characters only, and nothing past a stop string.

A stop string may span tokens, so text that could still become one is held back until it is decided.
"""

from collections.abc import Sequence

from fathom.data.tokenizer import Tokenizer


class GrowingText:
    """``add`` token ids one by one; each call returns the text that became certain.

    Attributes:
        text: all text given out so far.
        stopped: whether a stop string came; it and what follows are never given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.decode_stream()
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.text = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that became certain with this id, perhaps nothing."""
        return "" if self.stopped else self._grow(self._decoder.add(token_id), last=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._grow(self._decoder.finish(), last=True)

    def _grow(self, new: str, *, last: bool) -> str:
        pending = self._held + new
        hits = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if hits:
            self.stopped, certain = True, min(hits)
        else:
            certain = len(pending) - (0 if last else longest_overlap(pending, self._stop))
        self._held = "" if self.stopped else pending[certain:]
        self.text += pending[:certain]
        return pending[:certain]


def longest_overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop string without completing it."""
    lengths = range(max((len(s) for s in stop), default=1) - 1, 0, -1)
    return next(
        (n for n in lengths if n <= len(text) and any(s.startswith(text[-n:]) for s in stop)), 0
    )
