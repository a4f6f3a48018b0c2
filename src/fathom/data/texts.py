"""Texts under any model's own tokenizer: what a checkpoint that we did not train is measured on.

Bits per byte need the ids of the model's vocabulary and the bytes of the original text. So a corpus
that was prepared with another vocabulary is decoded, exactly, and encoded again.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fathom.data.dataset import Dataset, Shard
from fathom.data.shards import SPLITS, Kind
from fathom.data.sources import SourceReader, find_files
from fathom.data.tokenizer import Tokenizer


class Texts(Dataset):
    """Documents in memory, all of them held out.

    A document is its text, after BOS where the tokenizer says that a text begins with it. Without,
    its first token has nothing to be predicted from and does not count. No end-of-text token is
    predicted: a model that was tuned to talk has never seen one behind a book.

    Args:
        tokenizer: the model's.
        texts: by domain.

    Raises:
        ValueError: a domain without a text of two tokens.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> None:
        self.folder = Path(os.devnull)
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.domains, self.statistics = list(texts), {"domains": {}}
        self.fingerprint = f"texts {tokenizer.fingerprint()}"
        self._kinds: dict[str, Kind] = dict.fromkeys(texts, "text")
        empty = self._shard([], [])
        self._shards = {(split, domain): empty for split in SPLITS for domain in texts}
        for domain, documents in texts.items():
            encoded = [[*tokenizer.begin_ids, *ids] for ids in tokenizer.encode_many(documents)]
            kept = [(ids, text) for ids, text in zip(encoded, documents, strict=True) if ids[1:]]
            if not kept:
                raise ValueError(f"the domain {domain} holds no text of two tokens or more")
            lengths = [len(text.encode()) for _, text in kept]
            self._shards["heldout", domain] = self._shard([ids for ids, _ in kept], lengths)

    def _shard(self, documents: Sequence[Sequence[int]], num_bytes: Sequence[int]) -> Shard:
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        ids = np.array([i for document in documents for i in document], np.int32)
        return Shard(ids, offsets, np.array(num_bytes, np.int64), Path(os.devnull))


def decoded(dataset: Dataset, tokenizer: Tokenizer, max_bytes: int | None = None) -> Texts:
    """The held-out texts of a prepared corpus under another tokenizer; images are left out.

    Args:
        max_bytes: of each domain, only the documents that are needed for so many bytes.
    """
    texts: dict[str, list[str]] = {}
    for domain in (name for name in dataset.domains if dataset.kind(name) == "text"):
        found = texts[domain] = []
        left = float("inf") if max_bytes is None else max_bytes
        for index, size in enumerate(dataset.document_bytes("heldout", domain)):
            if left <= 0:
                break
            found.append(dataset.tokenizer.decode(dataset.document("heldout", domain, index)))
            left -= int(size)
    return Texts(tokenizer, texts)


def read_texts(sources: Iterable[Path], tokenizer: Tokenizer) -> Texts:
    """The documents of files and folders, as ``fathom data prepare`` reads them.

    Raises:
        ValueError: nothing usable in the sources.
    """
    reader = SourceReader(find_files(sources))
    texts: dict[str, list[str]] = {}
    for document in reader:
        texts.setdefault(document.domain, []).append(document.text)
    if not texts:
        raise ValueError(f"there is no text to read: {reader.problems.counts or 'no files'}")
    return Texts(tokenizer, texts)
