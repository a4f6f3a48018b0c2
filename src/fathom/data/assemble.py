"""From documents to a prepared folder: what ``prepare`` and ``medium`` share.

Everything here depends on the documents alone, not on the order in which they come, except the
order of the training documents on the disk (which the loader shuffles).
"""

import hashlib
import heapq
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fathom.data.corpus import HELDOUT_ONE_IN, Document, encode_documents, is_heldout
from fathom.data.shards import DomainFiles, Encoded, ShardWriter, finish_folder, write_split
from fathom.data.sources import Problems
from fathom.data.tokenizer import Tokenizer

SAMPLE_BYTES = 30_000_000
BATCH_BYTES = 4_000_000
Progress = Callable[[str, int, int], None]  # stage, done, total (bytes)


def text_hash(text: str) -> bytes:
    """Equal for texts that differ in white space only."""
    return hashlib.md5(" ".join(text.split()).encode(), usedforsecurity=False).digest()


def check_split(domain: str, n_documents: int, n_heldout: int) -> None:
    """Refuse a domain on which nothing could be trained or measured."""
    if 0 < n_heldout < n_documents:
        return
    lacks = "training" if n_heldout else "held-out"
    raise ValueError(
        f"domain {domain!r} has no {lacks} text: one document in {HELDOUT_ONE_IN} is held out, "
        f"chosen by its id, and it has {n_documents} in all; give it more and smaller documents "
        "(some hundred files or JSON lines instead of a few long texts)"
    )


class BalancedSample:
    """Texts for the tokenizer: equally many bytes a domain, those with the smallest hashes."""

    def __init__(self, budget: int = SAMPLE_BYTES) -> None:
        self._budget = budget
        self._heaps: dict[str, list[tuple[int, str]]] = {}  # largest hash first
        self._bytes: dict[str, int] = {}

    def add(self, domain: str, key: bytes, text: str) -> None:
        """Consider a text; ``key`` is its hash."""
        is_new = domain not in self._heaps
        heapq.heappush(self._heaps.setdefault(domain, []), (-int.from_bytes(key, "big"), text))
        self._bytes[domain] = self._bytes.get(domain, 0) + len(text.encode())
        for name in self._heaps if is_new else (domain,):
            self._trim(name)

    def _trim(self, domain: str) -> None:
        heap, share = self._heaps[domain], self._budget // len(self._heaps)
        while self._bytes[domain] > share and len(heap) > 1:
            _, text = heapq.heappop(heap)
            self._bytes[domain] -= len(text.encode())

    def texts(self) -> Iterator[tuple[bytes, str]]:
        """Hash and text, domain after domain, by hash."""
        for domain in sorted(self._heaps):
            for negative, text in sorted(self._heaps[domain], reverse=True):
                yield (-negative).to_bytes(16, "big"), text


class CorpusWriter:
    """Encodes documents in batches and writes the splits of every domain they name."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._waiting: list[tuple[str, Document]] = []
        self._waiting_bytes = 0
        self._train: dict[str, ShardWriter] = {}
        self._heldout: dict[str, list[Encoded]] = {}
        self._too_short: list[str] = []

    def add(self, domain: str, document: Document) -> None:
        """Take a document; its id decides its split."""
        self._waiting.append((domain, document))
        self._waiting_bytes += len(document.text)
        if self._waiting_bytes >= BATCH_BYTES:
            self._write()

    def finish(self, duplicates: int, problems: Problems, **more: Any) -> dict[str, Any]:
        """Write what is left, the held-out splits in the order of crc32, and ``meta.json``.

        Returns the statistics: domains, duplicates, what was left out and why, and ``more``.
        """
        self._write()
        for name in self._too_short:
            problems.add("only one token", name)
        if not self._train:
            raise ValueError("no document has more than one token")
        domains = [self._finish_domain(domain) for domain in sorted(self._train)]
        statistics = {"duplicates": duplicates, "left_out": asdict(problems), **more}
        finish_folder(self._folder, self._tokenizer, domains, statistics)
        return {"domains": {domain["name"]: domain for domain in domains}, **statistics}

    def _finish_domain(self, domain: str) -> DomainFiles:
        train = self._train[domain].finish()
        heldout = sorted(self._heldout[domain], key=lambda e: (zlib.crc32(e.name.encode()), e.name))
        check_split(domain, train["documents"] + len(heldout), len(heldout))
        size = self._tokenizer.vocab_size
        written = write_split(self._folder / "heldout", domain, size, heldout)
        return {"name": domain, "kind": "text", "train": train, "heldout": written}

    def _write(self) -> None:
        """A text of a single token has nothing to predict: it is left out and named."""
        domains, documents = [d for d, _ in self._waiting], [d for _, d in self._waiting]
        by_domain: dict[str, list[Encoded]] = {}
        encoded = encode_documents(documents, self._tokenizer)
        for domain, document in zip(domains, encoded, strict=True):
            if len(document.ids) <= 3:
                self._too_short.append(document.name)
            else:
                by_domain.setdefault(domain, []).append(document)
        for domain, found in by_domain.items():
            self._split(domain, found)
        self._waiting, self._waiting_bytes = [], 0

    def _split(self, domain: str, found: list[Encoded]) -> None:
        if domain not in self._train:
            size = self._tokenizer.vocab_size
            self._train[domain] = ShardWriter(self._folder / "train", domain, size)
            self._heldout[domain] = []
        self._heldout[domain] += [document for document in found if is_heldout(document.name)]
        self._train[domain].add(document for document in found if not is_heldout(document.name))


def describe(statistics: dict[str, Any]) -> str:
    """The statistics of a prepared folder as a table, and what was left out and why."""
    head = ("domain", "documents", "MB", "tokens", "bytes/token", "held out", "MB", "tokens")
    rows: list[tuple[str, ...]] = [head]
    for name, domain in statistics["domains"].items():
        train, heldout = domain["train"], domain["heldout"]
        ratio = train["bytes"] / max(train["tokens"], 1)
        sizes = [f"{split['bytes'] / 1e6:.2f}" for split in (train, heldout)]
        numbers = [f"{train['documents']:,}", sizes[0], f"{train['tokens']:,}", f"{ratio:.2f}"]
        numbers += [f"{heldout['documents']:,}", sizes[1], f"{heldout['tokens']:,}"]
        rows.append((name, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    if statistics.get("duplicates"):
        lines.append(f"{statistics['duplicates']:,} exact duplicates dropped")
    for name, made in statistics.get("made", {}).items():
        lines.append(
            f"{name}: dropped {made['near_duplicates']:,} near copies and {made['half_seen']:,} "
            f"held-out documents known from training; {made['residual_overlap']:.1%} of held-out "
            "13-word windows are still in training"
        )
    left_out = statistics.get("left_out", {"counts": {}})
    for kind, count in left_out["counts"].items():
        names = ", ".join(map(printable, left_out["examples"][kind]))
        lines.append(f"{count:,} left out, {kind}: {names}")
    return "\n".join(lines)


def printable(name: str) -> str:
    """A stranger's name without control characters, which a terminal might obey."""
    return "".join(c if c.isprintable() else "?" for c in name)
