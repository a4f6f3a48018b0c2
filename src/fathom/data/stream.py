"""Which tokens stand in which row: arithmetic on counters, without reading a token.

Row n of a run depends on the seed, on n, and on how many rows each domain has had; nothing else is
remembered, so a run resumes to the token from a few integers. A domain's documents form one endless
sequence, shuffled anew each epoch and cut into rows: no token is lost or repeated within an epoch.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MASK = 2**64 - 1


class Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document, as they stand in a row."""

    domain: str
    document: int
    start: int
    stop: int


def counter_hash(counters: NDArray[np.uint64], *keys: int) -> NDArray[np.uint64]:
    """64 random bits for each counter: splitmix64's mixing (Steele et al. 2014), keyed.

    Written out instead of ``numpy.random``, whose streams may change between versions.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state + np.uint64(key & MASK))
    return _mix(counters + state)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class DomainStream:
    """One domain as an endless sequence of rows of ``seq_len`` tokens."""

    def __init__(self, domain: str, offsets: NDArray[np.int64], seed: int, seq_len: int) -> None:
        self.domain = domain
        self.epoch_tokens = int(offsets[-1])
        self.seq_len = seq_len
        self._lengths = np.diff(offsets)
        self._keys = (seed, zlib.crc32(domain.encode()))
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def row(self, index: int) -> list[Piece]:
        """The pieces of documents that fill the domain's row ``index``."""
        at, end = index * self.seq_len, (index + 1) * self.seq_len
        pieces = []
        while at < end:
            epoch, within = divmod(at, self.epoch_tokens)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, within, side="right"))
            document, length = int(order[place]), int(self._lengths[order[place]])
            start = within - (int(ends[place]) - length)
            stop = min(length, start + end - at)
            pieces.append(Piece(self.domain, document, start, stop))
            at += stop - start
        return pieces

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents' order in an epoch, and where each ends; the last two are kept."""
        if epoch not in self._epochs:
            counters = np.arange(len(self._lengths), dtype=np.uint64)
            order = np.argsort(counter_hash(counters, *self._keys, epoch), kind="stable")
            self._epochs = {e: kept for e, kept in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = order, np.cumsum(self._lengths[order])
        return self._epochs[epoch]


@dataclass(frozen=True)
class Mixture:
    """Whose turn it is: the domain that is furthest behind its share, with a random nudge.

    The number of rows of every domain stays within two of its share at any point; the nudge, half a
    row at most, keeps a domain from always meeting the same rank.
    """

    shares: NDArray[np.float64]  # [domains], adding up to 1
    seed: int

    def choose(self, rows_drawn: NDArray[np.int64], n: int) -> list[tuple[int, int]]:
        """The next ``n`` rows as (domain, row of that domain), after ``rows_drawn`` rows each."""
        drawn, first, width = rows_drawn.copy(), int(rows_drawn.sum()), len(self.shares)
        counters = np.arange(first * width, (first + n) * width, dtype=np.uint64)
        nudges = counter_hash(counters, self.seed).reshape(n, width) / 2.0**65
        nudges[:, self.shares == 0] = -np.inf
        chosen = []
        for row, nudge in enumerate(nudges, first + 1):
            domain = int(np.argmax(self.shares * row - drawn + nudge))
            chosen.append((domain, int(drawn[domain])))
            drawn[domain] += 1
        return chosen
