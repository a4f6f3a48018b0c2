"""``fathom data prepare``: a user's files become a folder that trains, in two passes.

The first pass decides: which copy of a text stays, which domains there are, what the tokenizer is
trained on. The second encodes and writes. Memory holds a hash and an id per document, the sample
for the tokenizer and the held-out documents, never the corpus.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fathom.data.assemble import (
    BalancedSample,
    CorpusWriter,
    Progress,
    check_split,
    text_hash,
)
from fathom.data.corpus import Document, is_heldout
from fathom.data.shards import atomic_folder, refuse_existing
from fathom.data.sources import SourceDocument, SourceReader, find_files
from fathom.data.tokenizer import Tokenizer, train_tokenizer


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize files or folders into ``out``, split by document, exact duplicates dropped.

    Args:
        sources: .txt, .md, .jsonl (``text``, optionally ``domain``), .parquet (the same columns),
            or folders of them, whose subfolders are the domains; all but .parquet also .gz, .xz or
            .zst.
        tokenizer: a byte-level ``tokenizer.json``; None trains one of ``vocab_size`` ids.
        force: replace a prepared corpus in ``out``.
        progress: called with the stage, the bytes of the sources behind it, and all their bytes.

    Returns:
        The statistics, as ``Dataset.statistics`` gives them and ``describe`` prints them.

    Raises:
        ValueError: nothing usable in the sources, a domain without training or held-out text, an
            ``out`` that exists, a tokenizer that cannot be used.
    """
    refuse_existing(Path(out), force=force)
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    files = find_files([Path(source) for source in sources])
    reader, survey = SourceReader(files), Survey()
    for document in _watched(reader, "reading", progress):
        survey.add(document)
    survey.check()
    chosen = given or train_tokenizer(survey.sample(), vocab_size)
    with atomic_folder(Path(out), force=force) as folder:
        writer = CorpusWriter(folder, chosen)
        for document in _watched(SourceReader(files), "tokenizing", progress):
            if survey.takes(document):
                writer.add(document.domain, Document(document.id, document.text))
        return writer.finish(survey.duplicates, reader.problems)


def _watched(
    reader: SourceReader, stage: str, progress: Progress | None
) -> Iterator[SourceDocument]:
    for document in reader:
        yield document
        if progress is not None:
            progress(stage, reader.bytes_read, reader.total_bytes)
    if progress is not None:
        progress(stage, reader.total_bytes, reader.total_bytes)


class Survey:
    """The first pass: every distinct text once, and a sample for the tokenizer."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[str, str]] = {}  # text hash: id and domain of its one copy
        self._sample = BalancedSample()
        self.duplicates = 0

    def add(self, document: SourceDocument) -> None:
        """Of equal texts the copy with the smallest id stays, whatever the order of the sources."""
        key, copy = text_hash(document.text), (document.id, document.domain)
        if key in self._kept:
            self.duplicates += 1
            self._kept[key] = min(self._kept[key], copy)
        else:
            self._kept[key] = copy
            self._sample.add(document.domain, key, document.text)

    def check(self) -> None:
        """Refuse sources without text, and a domain without training or held-out text."""
        documents = Counter(domain for _, domain in self._kept.values())
        heldout = Counter(domain for name, domain in self._kept.values() if is_heldout(name))
        if not documents:
            raise ValueError("the sources hold no usable text (.txt, .md, .jsonl or .parquet)")
        for domain in sorted(documents):
            check_split(domain, documents[domain], heldout[domain])

    def sample(self) -> list[str]:
        """Training text for the tokenizer: a held-out text is never in it."""
        return [text for key, text in self._sample.texts() if not is_heldout(self._kept[key][0])]

    def takes(self, document: SourceDocument) -> bool:
        """In the second pass: True for the copy that stays, once."""
        key = text_hash(document.text)
        if self._kept.get(key) != (document.id, document.domain):
            return False
        del self._kept[key]
        return True
