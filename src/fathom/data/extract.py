"""Documents out of unpacked packages: one function per package, from its folder to its documents.

A document id is built from names inside the package, so that a split by id never moves.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fathom.data.corpus import Document

AUSTEN_CHAPTER = re.compile(r"^ *chapter +(?:\d+|[ivxlc]+)\.?$", re.IGNORECASE)
SET_MM_SECTION = re.compile(r"\n(?= *\$\(\n(?:#\*#\*|=-=-|-\.-\.|####))")
POEM_KEYS = ("paragraphs", "content", "para")
POEMS_SKIPPED = ("strains", "rank", "error", "author", "wenzimengqiu")  # the last: a glossary
POEM_BLOCK_BYTES = 4000


def austen(root: Path) -> Iterator[Document]:
    """Debian ``r-cran-janeaustenr``: six novels, a chapter is a document."""
    [database] = root.rglob("janeaustenr/data/Rdata.rdb")
    for lines in r_character_vectors(database.read_bytes()):
        novel = slug(lines[0])
        starts = [at for at, line in enumerate(lines) if AUSTEN_CHAPTER.match(line)]
        for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True), 1):
            yield Document(f"austen/{novel}/{number:02}", "\n".join(lines[a:b]).strip() + "\n")


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """The vectors of an R lazy-load database: a length and a zlib stream each, end to end."""
    at = 0
    while at < len(database):
        stream = zlib.decompressobj()
        raw = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        yield _r_strings(raw)


def _r_strings(raw: bytes) -> list[str]:
    """R's serialization 3 of a character vector: big-endian, a flag and a length per string."""
    (encoding_length,) = struct.unpack_from(">i", raw, 14)
    at = 18 + encoding_length
    kind, count = struct.unpack_from(">ii", raw, at)
    assert kind & 0xFF == 16, "not a character vector"
    at, strings = at + 8, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", raw, at + 4)
        strings.append(raw[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def metamath(root: Path) -> Iterator[Document]:
    """Debian ``metamath-databases``: ``set.mm``, a section is a document; it keeps their order."""
    [database] = root.rglob("set.mm")
    for number, section in enumerate(SET_MM_SECTION.split(database.read_text(encoding="utf-8"))):
        yield Document(f"set.mm/{number:04}", section.strip("\n") + "\n")


def python_modules(root: Path, skip: Iterable[str]) -> Iterator[Document]:
    """Every ``.py`` file under ``root`` without a path part of ``skip``, in the order of names."""
    skip = set(skip)
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if file.is_file() and not skip.intersection(name.parts):
            text = read_text(file)
            if text:
                yield Document(name.as_posix(), text)


def poems(root: Path, collections: Iterable[str] | None = None) -> Iterator[Document]:
    """npm ``chinese-poetry``: consecutive poems or chapters of a file, about 4 kB a document.

    A text is dropped when its first 24 Han characters were seen before: collections overlap.
    """
    dist = root / "package" / "dist"
    names = collections or sorted(path.name for path in dist.iterdir())
    seen: set[str] = set()
    for name in names:
        for file in sorted((dist / name).rglob("*.json")):
            if not any(word in file.relative_to(dist).as_posix() for word in POEMS_SKIPPED):
                yield from _blocks(file.relative_to(dist).with_suffix("").as_posix(), file, seen)


def _blocks(name: str, file: Path, seen: set[str]) -> Iterator[Document]:
    block: list[str] = []
    number = 0
    for poem in _poems(json.loads(file.read_text(encoding="utf-8"))):
        key = "".join(re.findall(r"[\u3400-\u9fff]", poem.split("\n", 1)[1]))[:24]
        if key in seen:
            continue
        seen.add(key)
        block.append(poem)
        if sum(len(poem.encode()) for poem in block) >= POEM_BLOCK_BYTES:
            yield Document(f"{name}/{number:04}", "\n".join(block))
            block, number = [], number + 1
    if block:
        yield Document(f"{name}/{number:04}", "\n".join(block))


def _poems(node: Any) -> Iterator[str]:
    """Title and lines of everything in the tree that has a list of lines."""
    if isinstance(node, list):
        for child in node:
            yield from _poems(child)
    elif isinstance(node, dict):
        title = node.get("title") or node.get("chapter") or node.get("rhythmic") or ""
        for key in POEM_KEYS:
            lines = node.get(key)
            if isinstance(lines, list) and lines and isinstance(lines[0], str):
                yield "\n".join([title, *lines]) + "\n"
            elif isinstance(lines, list):
                yield from _poems(lines)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file; empty where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def slug(title: str) -> str:
    """Lower-case words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))
