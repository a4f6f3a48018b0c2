"""The bundled corpus: five domains of real text that need no network, and their split.

``bundled/<domain>.xz`` holds documents as JSON lines, ``heldout.txt`` the fixed held-out list,
``SOURCES.md`` where everything came from. Tokenized once per content and vocabulary into the user's
cache, from where every process maps it.
"""

import atexit
import hashlib
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fathom.data.images import BEGIN, pixels_to_ids
from fathom.data.shards import (
    FORMAT,
    DomainFiles,
    Encoded,
    atomic_folder,
    finish_folder,
    write_split,
)
from fathom.data.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "bundled"
TEXT_DOMAINS = ("prose", "zh", "code", "maths")
DOMAINS = (*TEXT_DOMAINS, "image")
HELDOUT_ONE_IN = 50


class Document(NamedTuple):
    """A unit that is never cut by the split: a chapter, a file, a page."""

    id: str
    text: str


def is_heldout(document_id: str) -> bool:
    """The split of everything but the bundled corpus: one in 50, by the id alone."""
    return zlib.crc32(document_id.encode()) % HELDOUT_ONE_IN == 0


def read_bundled(domain: str) -> list[Document]:
    """The documents of a bundled domain; an image's text is 64 base-17 characters, a pixel each."""
    lines = lzma.decompress((BUNDLED / f"{domain}.xz").read_bytes()).decode().splitlines()
    return [Document(**json.loads(line)) for line in lines]


def read_heldout() -> dict[str, list[str]]:
    """The ids of each domain's held-out documents, in the order in which they are evaluated."""
    heldout: dict[str, list[str]] = {}
    for line in (BUNDLED / "heldout.txt").read_text(encoding="utf-8").splitlines():
        domain, document_id = line.split("\t")
        heldout.setdefault(domain, []).append(document_id)
    return heldout


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """BOS, text, EOS of each document, with the UTF-8 bytes of the text."""
    encoded = tokenizer.encode_many([document.text for document in documents])
    for document, ids in zip(documents, encoded, strict=True):
        ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        yield Encoded(document.id, ids, len(document.text.encode()))


def encode_images(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """BEGIN, pixels, END of each image, with the number of pixels."""
    begin_id = tokenizer.token_id(BEGIN)
    for document in documents:
        ids = pixels_to_ids(document.text, begin_id)
        yield Encoded(document.id, ids, len(document.text))


def cache_folder() -> Path:
    """Where prepared and fetched data are kept: ``$XDG_CACHE_HOME/fathom``, ``~/.cache/fathom``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom"


def bundled_folder(tokenizer: str) -> Path:
    """The bundled corpus under the ``"1k"`` or ``"4k"`` vocabulary, made on first use.

    Several processes may call this at once: each builds beside the final name, the first to rename
    wins, and the others take what is there. A cache that cannot be written is no error: the folder
    is then a temporary one of this process.
    """
    name = f"bundled-{tokenizer}-{_content_hash(tokenizer)}"
    folder = cache_folder() / name
    if (folder / "meta.json").is_file():
        return folder
    try:
        build_bundled(folder, tokenizer)
    except (OSError, ValueError):
        if (folder / "meta.json").is_file():  # another process was first
            return folder
        folder = Path(tempfile.mkdtemp(prefix="fathom-")) / name
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
        build_bundled(folder, tokenizer)
    return folder


def build_bundled(out: Path, tokenizer_name: str) -> None:
    """Tokenize the bundled corpus into a prepared folder."""
    tokenizer = Tokenizer.load(BUNDLED / f"tokenizer-{tokenizer_name}.json")
    heldout = read_heldout()
    with atomic_folder(out) as folder:
        domains = [_write_domain(folder, name, heldout[name], tokenizer) for name in DOMAINS]
        statistics = {"source": "bundled", "tokenizer": tokenizer_name}
        finish_folder(folder, tokenizer, domains, statistics)


def _write_domain(
    folder: Path, domain: str, heldout_ids: Sequence[str], tokenizer: Tokenizer
) -> DomainFiles:
    by_id = {document.id: document for document in read_bundled(domain)}
    heldout = [by_id.pop(document_id) for document_id in heldout_ids]
    encode = encode_images if domain == "image" else encode_documents
    train = encode([*by_id.values()], tokenizer)
    size = tokenizer.vocab_size
    return {
        "name": domain,
        "kind": "symbols" if domain == "image" else "text",
        "train": write_split(folder / "train", domain, size, train),
        "heldout": write_split(folder / "heldout", domain, size, encode(heldout, tokenizer)),
    }


def _content_hash(tokenizer: str) -> str:
    """Changes with anything the prepared folder depends on."""
    digest = hashlib.sha256(str(FORMAT).encode())
    files = [f"{domain}.xz" for domain in DOMAINS]
    for file in [*files, "heldout.txt", f"tokenizer-{tokenizer}.json"]:
        digest.update((BUNDLED / file).read_bytes())
    return digest.hexdigest()[:16]
