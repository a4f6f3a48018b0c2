"""What needs no training: bits per byte of xz and of an order-2 byte model on the held-out text.

A reader who has never seen a bit per byte knows a compressed file. Both are measured on exactly the
bytes that the models are measured on; images have no bytes of text and are left out.
"""

import lzma
from collections.abc import Iterator
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fathom.data.dataset import Dataset
from fathom.data.shards import Split

ADDED = 0.1  # pseudo-count of each of the 256 bytes
CONTEXTS = 256**2
CHUNK = 2**24  # bytes counted at once


def text_domains(dataset: Dataset) -> list[str]:
    """Domains whose losses are bits per byte."""
    return [domain for domain in dataset.domains if dataset.kind(domain) == "text"]


def xz_bits_per_byte(dataset: Dataset, *, with_training: bool = True) -> dict[str, float]:
    """Bits per held-out byte under ``xz -9e``, by domain.

    Args:
        with_training: the domain's training text comes first, and only what the held-out text adds
            to the compressed size counts (xz sees at most the 64 MiB before each byte). False
            compresses the held-out text alone.
    """
    return {domain: _xz(dataset, domain, with_training) for domain in text_domains(dataset)}


def order2_bits_per_byte(dataset: Dataset) -> dict[str, float]:
    """Bits per held-out byte of one byte model for all domains, ``p(c | a b)``, by domain.

    ``p = (count(a, b, c) + 0.1) / (count(a, b) + 25.6)``, counted over the training text of all
    text domains together. Two zero bytes stand before each document.
    """
    counts = np.zeros(CONTEXTS * 256, np.int64)
    for domain in text_domains(dataset):
        for codes in _trigrams(dataset, "train", domain):
            counts += np.bincount(codes, minlength=len(counts))
    totals = counts.reshape(CONTEXTS, 256).sum(1)
    bits = {}
    for domain in text_domains(dataset):
        total = 0.0
        for codes in _trigrams(dataset, "heldout", domain):
            p = (counts[codes] + ADDED) / (totals[codes >> 8] + 256 * ADDED)
            total -= float(np.log2(p).sum())
        bits[domain] = total / int(dataset.document_bytes("heldout", domain).sum())
    return bits


def mean_over_domains(bits: dict[str, float]) -> float:
    """The unweighted mean, as models are compared."""
    return fmean(bits.values())


def text_bytes(dataset: Dataset, split: Split, domain: str) -> Iterator[bytes]:
    """The text of each document, out of its ids."""
    for index in range(dataset.documents(split, domain)):
        ids = dataset.document(split, domain, index)
        yield dataset.tokenizer.decode_bytes(ids.tolist())


def _xz(dataset: Dataset, domain: str, with_training: bool) -> float:
    heldout = b"".join(text_bytes(dataset, "heldout", domain))
    before = b"".join(text_bytes(dataset, "train", domain)) if with_training else b""
    added = _xz_size(before + heldout) - (_xz_size(before) if before else 0)
    return 8 * added / len(heldout)


def _xz_size(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def _trigrams(dataset: Dataset, split: Split, domain: str) -> Iterator[NDArray[np.int64]]:
    """Codes ``a * 65536 + b * 256 + c`` of every byte ``c`` after ``a b``, in chunks."""
    parts: list[bytes] = []
    for text in text_bytes(dataset, split, domain):
        parts.append(text)
        if sum(map(len, parts)) >= CHUNK:
            yield _codes(parts)
            parts = []
    if parts:
        yield _codes(parts)


def _codes(parts: list[bytes]) -> NDArray[np.int64]:
    """The zero bytes before a document are contexts, never predicted."""
    padded = np.frombuffer(b"".join(b"\0\0" + part for part in parts), np.uint8).astype(np.int64)
    starts = np.cumsum([0, *(len(part) + 2 for part in parts[:-1])])
    predicted = np.ones(len(padded), np.bool_)
    predicted[starts] = predicted[starts + 1] = False
    (at,) = np.nonzero(predicted)
    return padded[at - 2] * 65536 + padded[at - 1] * 256 + padded[at]
