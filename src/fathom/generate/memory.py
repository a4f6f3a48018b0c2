"""What a conversation keeps between its answers: the cache of all tokens read so far.

The next prompt repeats the last one and its answer, so only what is new has to be read. Where they
part (a template may write an answer otherwise than it was generated), the cache is cut back.
"""

from collections.abc import Sequence
from itertools import takewhile

from fathom.layers.cache import Cache
from fathom.model import Decoder


def can_be_cut_back(model: Decoder) -> bool:
    """Whether a cache of this model can forget its newest tokens.

    One with a window, or with entries of several tokens, has lost what stood there before them.
    """
    streams = [stream for group in model.cfg.groups for stream in group.attention.streams()]
    return all(stream.window is None and stream.tokens_per_entry == 1 for stream in streams)


class Memory:
    """The cache of one conversation with one model.

    Attributes:
        ids: the tokens that were surely read; the engine adds to them after each forward.
    """

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self.ids: list[int] = []

    def recall(self, model: Decoder, prompt: Sequence[int], needed: int) -> Cache:
        """A cache of ``needed`` positions; its ``length`` says how much of the prompt it holds.

        At least the last token is left to be read, for what follows it.
        """
        pairs = zip(self.ids, prompt[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache = self._cache
        if cache is not None and cache.length != known and not can_be_cut_back(model):
            cache = None
        if cache is None or cache.capacity < needed:
            cache, known = model.new_cache(1, min(2 * needed, model.cfg.max_seq_len)), 0
        cache.length = known
        self._cache, self.ids = cache, []  # nothing is sure until it is read
        return cache
