"""A user's own files as documents: what cannot be used is counted and named, never fatal.

A document's id is its path inside the source it was given in, with ``#n`` for the n-th line or row
of a file; so the split depends neither on where the files lie nor on the order of the sources.
"""

import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

PACKED = (".gz", ".xz", ".zst")
MAX_DOCUMENT_BYTES = 256 * 2**20  # a small packed file must not fill the memory
EXAMPLES = 10
DEFAULT_DOMAIN = "text"


class SourceDocument(NamedTuple):
    """A document with the domain that its folder or its ``domain`` field puts it in."""

    domain: str
    id: str
    text: str


class SourceFile(NamedTuple):
    """A file, its id within its source, and its domain."""

    path: Path
    id: str
    domain: str


@dataclass
class Problems:
    """How often what went wrong, with the first ten names of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one more of a kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.examples.setdefault(kind, [])
        if len(names) < EXAMPLES:
            names.append(name)


def find_files(sources: Iterable[Path]) -> list[SourceFile]:
    """All files of the sources, in the order of names; hidden ones are passed over.

    A folder's subfolders are the domains; files directly in it, and files given as sources, belong
    to the domain ``text``.
    """
    found = []
    for source in sources:
        if source.is_file():
            found.append(SourceFile(source, source.name, DEFAULT_DOMAIN))
        elif source.is_dir():
            for inner in _walk(source):
                domain = domain_name(inner.parts[0]) if len(inner.parts) > 1 else DEFAULT_DOMAIN
                found.append(SourceFile(source / inner, inner.as_posix(), domain))
        else:
            raise ValueError(f"source {source} is neither a file nor a folder")
    return found


def domain_name(name: str) -> str:
    """``name`` with everything but letters, digits, ``_`` and ``-`` replaced by ``-``."""
    return re.sub(r"[^\w-]+", "-", name)[:64].strip("-") or DEFAULT_DOMAIN


class SourceReader:
    """The documents of files, one after another; ``bytes_read`` of ``total_bytes`` are done."""

    def __init__(self, files: list[SourceFile]) -> None:
        self._files = files
        self._done = 0
        self._raw: IO[bytes] | None = None
        self.problems = Problems()
        self.total_bytes = sum(file.path.stat().st_size for file in files)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files as they lie on the disk, packed or not."""
        return self._done + (self._raw.tell() if self._raw else 0)

    def __iter__(self) -> Iterator[SourceDocument]:
        for file in self._files:
            try:
                yield from self._read(file)
            except _unpack_errors():
                self.problems.add("cannot be read or unpacked", file.id)
            self._done += file.path.stat().st_size

    def _read(self, file: SourceFile) -> Iterator[SourceDocument]:
        suffixes = [suffix.lower() for suffix in file.path.suffixes]
        kind, packing = suffixes[-1] if suffixes else "", ""
        if kind in PACKED:
            kind, packing = suffixes[-2] if len(suffixes) > 1 else "", kind
        if kind in (".txt", ".md"):
            with self._open(file, packing) as stream:
                content = stream.read(MAX_DOCUMENT_BYTES + 1)
            yield from self._checked(file.domain, file.id, content)
        elif kind == ".jsonl":
            with self._open(file, packing) as stream:
                yield from self._json_lines(file, stream)
        elif kind == ".parquet" and not packing:
            yield from self._parquet(file)
        else:
            self.problems.add("unknown kind of file", file.id)

    @contextmanager
    def _open(self, file: SourceFile, packing: str) -> Iterator[IO[bytes]]:
        with file.path.open("rb") as raw:
            self._raw = raw
            try:
                yield _unpacked(raw, packing, file.path)
            finally:
                self._raw = None

    def _json_lines(self, file: SourceFile, stream: IO[bytes]) -> Iterator[SourceDocument]:
        index = 0
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            if line.strip():
                name = f"{file.id}#{index}"
                index += 1
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    self.problems.add("not JSON", name)
                    continue
                yield from self._record(file, name, record)

    def _parquet(self, file: SourceFile) -> Iterator[SourceDocument]:
        parquet = needed("pyarrow.parquet", file.path)
        with parquet.ParquetFile(file.path) as table:
            columns = [c for c in ("text", "domain") if c in table.schema_arrow.names]
            if "text" not in columns:
                self.problems.add("no text field", file.id)
                return
            index = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    yield from self._record(file, f"{file.id}#{index}", record)
                    index += 1

    def _record(self, file: SourceFile, name: str, record: Any) -> Iterator[SourceDocument]:
        fields = record if isinstance(record, dict) else {}
        text, domain = fields.get("text"), fields.get("domain")
        if not isinstance(text, str):
            self.problems.add("no text field", name)
            return
        named = domain_name(domain) if isinstance(domain, str) else file.domain
        yield from self._checked(named, name, text.encode("utf-8", "surrogatepass"))

    def _checked(self, domain: str, name: str, content: bytes) -> Iterator[SourceDocument]:
        if len(content) > MAX_DOCUMENT_BYTES:
            self.problems.add("longer than 256 MiB", name)
            return
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.problems.add("not UTF-8", name)
            return
        if text.strip():
            yield SourceDocument(domain, name, text)
        else:
            self.problems.add("empty", name)


def needed(module: str, path: Path) -> Any:
    """An optional library, or a sentence that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.split(".")[0]
        raise ValueError(f"reading {path} needs {library}: pip install 'fathom-lm[data]'") from None


def _unpacked(raw: IO[bytes], packing: str, path: Path) -> IO[bytes]:
    match packing:
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".zst":
            reader = needed("zstandard", path).ZstdDecompressor()
            return io.BufferedReader(reader.stream_reader(raw, read_across_frames=True))
        case _:
            return raw


def _unpack_errors() -> tuple[type[Exception], ...]:
    """What a damaged or unreadable file raises, by the libraries that are loaded."""
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error, lzma.LZMAError]
    for module, name in (("zstandard", "ZstdError"), ("pyarrow", "ArrowException")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():  # no pipe, no broken link
                yield path.relative_to(root)
