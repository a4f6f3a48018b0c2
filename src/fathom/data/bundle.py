"""Rebuild ``bundled/`` from its packages: ``python -m fathom.data.bundle FOLDER``.

FOLDER holds the unpacked packages, one folder each, as ``bundled/SOURCES.md`` says. What is written
is equal byte for byte, so the hashes in SOURCES.md can be checked.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fathom.data.corpus import BUNDLED, DOMAINS, TEXT_DOMAINS, Document, read_bundled, read_heldout
from fathom.data.extract import austen, metamath, poems, python_modules
from fathom.data.images import DIGITS, IMAGE_TOKENS
from fathom.data.tokenizer import train_tokenizer

VOCAB_SIZES = {"1k": 1024, "4k": 4096}
NOVELS = ("austen/pride-and-prejudice/", "austen/persuasion/")
COLLECTIONS = ("lunyu", "mengxue", "shijing", "sishuwujing")
NOT_CODE = ("test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data")
HELDOUT_DOCUMENTS, HELDOUT_BYTES, HELDOUT_IMAGES = 8, 60_000, 180


def documents(domain: str, root: Path) -> list[Document]:
    """The documents of a domain, from the unpacked packages under ``root``."""
    match domain:
        case "prose":
            found = austen(root / "r-cran-janeaustenr")
            return [document for document in found if document.id.startswith(NOVELS)]
        case "zh":
            found = shuffled(poems(root / "chinese-poetry", COLLECTIONS))
            return sorted(up_to(600_000, found))
        case "code":
            return stdlib(root / "libpython3.11-stdlib" / "usr/lib/python3.11", 38)
        case "maths":
            return list(up_to(400_000, middle_out(metamath(root / "metamath-databases"))))
        case _:
            return digits(root / "scikit-learn" / "sklearn/datasets/data/digits.csv.gz")


def stdlib(root: Path, count: int) -> list[Document]:
    """``count`` modules of 4 to 60 kB, chosen by the hash of their names."""
    modules = python_modules(root, NOT_CODE)
    fitting = [module for module in modules if 4_000 <= len(module.text.encode()) <= 60_000]
    return sorted(shuffled(fitting)[:count])


def middle_out(sections: Iterable[Document]) -> Iterator[Document]:
    """Sections of 2 to 20 kB from the middle of the bytes on: the opening has few proofs."""
    sections = list(sections)
    half, at = sum(len(section.text) for section in sections) // 2, 0
    for section in sections:
        at += len(section.text)
        if at > half and 2_000 <= len(section.text) <= 20_000:
            yield section


def digits(file: Path) -> list[Document]:
    """scikit-learn's ``load_digits``: 64 grey levels of 0 to 16 and the label, a line an image."""
    rows = csv.reader(io.StringIO(gzip.decompress(file.read_bytes()).decode()))
    return [
        Document(
            f"digit/{number:04}/{int(float(row[64]))}",
            "".join(DIGITS[int(float(x))] for x in row[:64]),
        )
        for number, row in enumerate(rows)
    ]


def up_to(n_bytes: int, found: Iterable[Document]) -> Iterator[Document]:
    """Documents until their text reaches ``n_bytes``."""
    total = 0
    for document in found:
        yield document
        total += len(document.text.encode())
        if total >= n_bytes:
            return


def shuffled(found: Iterable[Document]) -> list[Document]:
    """Documents in the order of the hash of their ids: fixed, and unrelated to their content."""
    return sorted(found, key=lambda document: hashlib.sha256(document.id.encode()).digest())


def choose_heldout(domain: str, found: list[Document]) -> list[Document]:
    """The first documents by hash, until there are 8 of them and 60 kB (180 images)."""
    ordered = shuffled(found)
    if domain == "image":
        return ordered[:HELDOUT_IMAGES]
    by_bytes = len(list(up_to(HELDOUT_BYTES, ordered)))
    return ordered[: max(by_bytes, HELDOUT_DOCUMENTS)]


def training_texts() -> list[str]:
    """As many bytes of training text from each text domain as the smallest has."""
    heldout = read_heldout()
    texts = {
        domain: [doc for doc in read_bundled(domain) if doc.id not in set(heldout[domain])]
        for domain in TEXT_DOMAINS
    }
    smallest = min(sum(len(doc.text.encode()) for doc in docs) for docs in texts.values())
    return [doc.text for docs in texts.values() for doc in up_to(smallest, shuffled(docs))]


def main(root: Path) -> None:
    """Write the domains, the held-out list and the tokenizers into the package's ``bundled/``."""
    heldout = []
    for domain in DOMAINS:
        found = documents(domain, root)
        lines = "".join(json.dumps(doc._asdict(), ensure_ascii=False) + "\n" for doc in found)
        packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
        (BUNDLED / f"{domain}.xz").write_bytes(packed)
        heldout += [f"{domain}\t{doc.id}\n" for doc in choose_heldout(domain, found)]
    (BUNDLED / "heldout.txt").write_text("".join(heldout), encoding="utf-8")
    for name, size in VOCAB_SIZES.items():
        tokenizer = train_tokenizer(training_texts(), size, IMAGE_TOKENS)
        assert tokenizer.vocab_size == size
        tokenizer.save(BUNDLED / f"tokenizer-{name}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
