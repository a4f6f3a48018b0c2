"""The folder of a prepared corpus, and how it comes to exist whole or not at all.

``meta.json``, ``tokenizer.json``, and for each split and domain ``<domain>.bin`` (ids, uint16, or
uint32 above 65,536 ids), ``<domain>.npz`` (where each document starts, how many bytes of text it
stands for) and ``<domain>.names.jsonl``. Written beside its final name, synced, then renamed.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from fathom.data.tokenizer import Tokenizer

Split = Literal["train", "heldout"]
Kind = Literal["text", "symbols"]
FORMAT = 1
SPLITS: tuple[Split, Split] = ("train", "heldout")


class Encoded(NamedTuple):
    """A document as ids, and the number of bytes (image: pixels) that its ids stand for."""

    name: str
    ids: list[int]
    size: int


class SplitFiles(TypedDict):
    """What ``meta.json`` says of one domain in one split."""

    documents: int
    tokens: int
    bytes: int
    sha256: str


class DomainFiles(TypedDict):
    """What ``meta.json`` says of one domain."""

    name: str
    kind: Kind
    train: SplitFiles
    heldout: SplitFiles


class ShardWriter:
    """Appends the documents of one domain and split; ``finish`` writes the index."""

    def __init__(self, folder: Path, domain: str, vocab_size: int) -> None:
        folder.mkdir(exist_ok=True)
        self._ids = folder / f"{domain}.bin"
        self._names = folder / f"{domain}.names.jsonl"
        self._index = folder / f"{domain}.npz"
        self._dtype = id_dtype(vocab_size)
        self._offsets = [0]
        self._bytes: list[int] = []
        self._digest = hashlib.sha256()

    def add(self, documents: Iterable[Encoded]) -> None:
        """Append documents; the files are open only meanwhile, so any number of domains goes."""
        with self._ids.open("ab") as ids, self._names.open("a", encoding="utf-8") as names:
            for document in documents:
                raw = np.asarray(document.ids, self._dtype).tobytes()
                ids.write(raw)
                self._digest.update(raw)
                names.write(json.dumps(document.name, ensure_ascii=False) + "\n")
                self._offsets.append(self._offsets[-1] + len(document.ids))
                self._bytes.append(document.size)

    def finish(self) -> SplitFiles:
        """Write the index; returns the counts and the hash that go into ``meta.json``."""
        offsets, n_bytes = np.array(self._offsets, np.int64), np.array(self._bytes, np.int64)
        np.savez(self._index, offsets=offsets, bytes=n_bytes)
        return {
            "documents": len(self._bytes),
            "tokens": self._offsets[-1],
            "bytes": sum(self._bytes),
            "sha256": self._digest.hexdigest(),
        }


def write_split(
    folder: Path, domain: str, vocab_size: int, documents: Iterable[Encoded]
) -> SplitFiles:
    """Write all documents of one domain and split."""
    writer = ShardWriter(folder, domain, vocab_size)
    writer.add(documents)
    return writer.finish()


def finish_folder(
    folder: Path, tokenizer: Tokenizer, domains: Sequence[DomainFiles], statistics: dict[str, Any]
) -> None:
    """Write ``tokenizer.json`` and ``meta.json``, which makes the folder a prepared corpus.

    The fingerprint is one hash of the tokenizer and of every id, whatever the folder is called.
    """
    identity: list[Any] = [tokenizer.fingerprint()]
    identity += [[d["name"], d["kind"], *(d[s]["sha256"] for s in SPLITS)] for d in domains]
    meta = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_dtype(tokenizer.vocab_size).str,
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32],
        "domains": list(domains),
        "statistics": statistics,
    }
    tokenizer.save(folder / "tokenizer.json")
    text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def check_domain_name(name: str) -> str:
    """A domain names files and configuration keys: letters, digits, ``_`` and ``-``."""
    if not re.fullmatch(r"[\w-]{1,64}", name):
        raise ValueError(f"domain {name!r} must be 1 to 64 letters, digits, '_' or '-'")
    return name


@contextmanager
def atomic_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``out`` that becomes ``out`` if the block ends well, else vanishes.

    Raises:
        ValueError: ``out`` exists and is not empty; ``force`` replaces a prepared corpus.
    """
    refuse_existing(out, force=force)
    partial = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        _move(partial, out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Refuse to write over a folder with anything in it, or over what is no prepared corpus."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "meta.json").is_file():
        raise ValueError(f"{out} exists and is not a prepared corpus: name another folder")
    if not force:
        raise ValueError(
            f"{out} holds a prepared corpus already: name another folder or use --force"
        )


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(partial: Path, out: Path) -> None:
    if not (out / "meta.json").exists():
        os.rename(partial, out)
        return
    replaced = out.with_name(f"{partial.name}-replaced")
    os.rename(out, replaced)
    os.rename(partial, out)
    shutil.rmtree(replaced)
