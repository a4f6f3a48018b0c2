"""Near duplicates and leaks: MinHash over shingles of words, and shared windows across the split.

MinHash (Broder 1997): the share of equal minima under random hash functions estimates the Jaccard
similarity of two sets. Documents are compared when one of 16 bands of 4 minima is equal.
"""

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fathom.data.stream import counter_hash

Hashes = NDArray[np.uint64]
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # a Han character is a word
BANDS, ROWS = 16, 4
SHINGLE, WINDOW = 8, 13
SIMILAR = 0.7
CHUNK = 4096  # shingles hashed at once
MULTIPLIERS = counter_hash(np.arange(BANDS * ROWS, dtype=np.uint64), 1) | np.uint64(1)
EMPTY = np.zeros(0, np.uint64)
ADDENDS = counter_hash(np.arange(BANDS * ROWS, dtype=np.uint64), 2)


def word_hashes(text: str) -> Hashes:
    """One hash a word, in their order."""
    return np.array([zlib.crc32(word.encode()) for word in WORD.findall(text)], np.uint64)


def windows(words: Hashes, n: int) -> Hashes:
    """One hash for each run of ``n`` words; a shorter text is one run."""
    n = min(n, len(words))
    if n == 0:
        return words
    combined = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        combined = counter_hash(combined) + words[i : i + len(combined)]
    return counter_hash(combined)


def minhash(words: Hashes) -> Hashes:
    """The 64 smallest hashes of a document's 8-word shingles, one per hash function."""
    shingles = np.unique(windows(words, SHINGLE))
    minima = np.full(BANDS * ROWS, 2**64 - 1, np.uint64)
    for at in range(0, len(shingles), CHUNK):
        hashed = shingles[at : at + CHUNK, None] * MULTIPLIERS + ADDENDS
        minima = np.minimum(minima, hashed.min(0))
    return minima


def near_duplicates(documents: Sequence[Hashes]) -> set[int]:
    """Which documents resemble an earlier one that stays (estimated Jaccard at least 0.7)."""
    dropped: set[int] = set()
    kept: list[Hashes] = []
    buckets: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    for index, words in enumerate(documents):
        signature = minhash(words)
        keys = [band.tobytes() for band in signature.reshape(BANDS, ROWS)]
        near = {i for key, bucket in zip(keys, buckets, strict=True) for i in bucket.get(key, ())}
        if any((kept[i] == signature).mean() >= SIMILAR for i in near):
            dropped.add(index)
            continue
        for key, bucket in zip(keys, buckets, strict=True):
            bucket.setdefault(key, []).append(len(kept))
        kept.append(signature)
    return dropped


def seen_shares(heldout: Sequence[Hashes], train: Iterable[Hashes]) -> list[float]:
    """For each held-out document, the share of its 13-word windows that also stand in training."""
    runs = [windows(words, WINDOW) for words in heldout]
    distinct, where = np.unique(np.concatenate([*runs, EMPTY]), return_inverse=True)
    if not len(distinct):
        return [0.0] * len(runs)
    seen = np.zeros(len(distinct), np.bool_)
    for words in train:
        run = windows(words, WINDOW)
        at = np.minimum(np.searchsorted(distinct, run), len(distinct) - 1)
        seen[at[distinct[at] == run]] = True
    parts = np.split(seen[where], np.cumsum([len(run) for run in runs])[:-1])
    return [float(part.mean()) if len(part) else 0.0 for part in parts]
