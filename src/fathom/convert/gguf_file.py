"""The container of llama.cpp: fields and tensors of one GGUF file, mapped into memory.

The file comes from a stranger. Its header is parsed here, every length checked against the file
before anything of it is taken; what its blocks of 4, 5, 6 or 8 bits mean, the library ``gguf``
knows.

Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.convert.files import open_inside
from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import Entry, TensorSource

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_FIELDS, MAX_TENSORS, MAX_DIMS = 10_000, 100_000, 4
MAX_NAME, MAX_TEXT, MAX_ARRAY = 256, 2**20, 2**21
MAX_HEADER_BYTES = 128 * 2**20
ALIGNMENT = 32

STRING, ARRAY = 8, 9
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class Form:
    """How a type lies in the file.

    Args:
        block: numbers in a block, which lie in one row.
        num_bytes: of a block.
        dtype: of the tensor that is read.
    """

    name: str
    block: int
    num_bytes: int
    dtype: torch.dtype = torch.float32


FORMS = {
    0: Form("F32", 1, 4),
    1: Form("F16", 1, 2, torch.float16),
    30: Form("BF16", 1, 2, torch.bfloat16),
    2: Form("Q4_0", 32, 18),
    3: Form("Q4_1", 32, 20),
    6: Form("Q5_0", 32, 22),
    7: Form("Q5_1", 32, 24),
    8: Form("Q8_0", 32, 34),
    12: Form("Q4_K", 256, 144),
    14: Form("Q6_K", 256, 210),
}


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: its form, its shape with rows first, its first byte."""

    form: Form
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.form.block * self.form.num_bytes


class GGUFFile(TensorSource):
    """One GGUF file.

    Attributes:
        fields: name to number, text, or list of them.

    Raises:
        CheckpointError: damaged, cut short, or of a type that this version does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_inside(path.parent, path.name) as file:
            if len(file.read(24)) < 24:
                raise CheckpointError(f"{path} is no GGUF file: it is too short")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        header = _Header(self._map, path)
        self.fields, infos = header.read()
        start = _aligned(header.position, _alignment(self.fields, path))
        self._spans = _spans(infos, start, len(self._map), path)
        self._entries = {
            name: Entry(span.shape, span.form.dtype, span.num_bytes)
            for name, span in self._spans.items()
        }

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        """A tensor as it is, or multiplied out to float32 where it is quantised."""
        span = self._spans[name]
        content = self._bytes[span.begin : span.begin + span.num_bytes]
        if span.form.block == 1:
            flat = torch.from_numpy(content.copy()).view(span.form.dtype)
            return flat.view(span.shape)
        from gguf import GGMLQuantizationType, quants  # brings much, so on first use

        blocks = content.reshape(-1, span.form.num_bytes)
        numbers = quants.dequantize(blocks, GGMLQuantizationType[span.form.name])
        return torch.from_numpy(numbers).view(span.shape)


class _Header:
    """A cursor over the header that never leaves the file."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self._content, self._path = content, path
        self._end = min(len(content), MAX_HEADER_BYTES)
        self.position = 0

    def read(self) -> tuple[dict[str, Any], list[tuple[str, list[int], int, int]]]:
        """All fields; of each tensor its name, dimensions (columns first), type and offset."""
        magic, version = self._content[:4], struct.unpack_from("<I", self._content, 4)[0]
        if magic != MAGIC or version not in VERSIONS:
            raise self._damaged(f"it is no GGUF file of version {VERSIONS[0]} or {VERSIONS[1]}")
        self.position = 8
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        if n_tensors > MAX_TENSORS or n_fields > MAX_FIELDS:
            raise self._damaged(f"it claims {n_tensors:,} tensors and {n_fields:,} fields")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self._text(MAX_NAME)
            if name in fields:
                raise self._damaged(f"it names {name!r} twice")
            fields[name] = self._value(self._number("I"))
        return fields, [self._info() for _ in range(n_tensors)]

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} cannot be used: {why}")

    def _take(self, length: int) -> int:
        """Pass over ``length`` bytes; where they begin."""
        begin = self.position
        if length > self._end - begin:
            raise self._damaged("its header is cut short")
        self.position += length
        return begin

    def _number(self, code: str) -> Any:
        begin = self._take(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._content, begin)[0]

    def _text(self, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            raise self._damaged(f"a name or text in it is {length:,} bytes long")
        begin = self._take(length)
        return self._content[begin : begin + length].decode("utf-8", "replace")

    def _value(self, kind: int, *, inside: bool = False) -> Any:
        if kind == STRING:
            return self._text(MAX_TEXT)
        if kind == ARRAY and not inside:
            inner, length = self._number("I"), self._number("Q")
            if length > MAX_ARRAY:
                raise self._damaged(f"a list in it has {length:,} items")
            if inner in NUMBERS:
                code = f"<{length}{NUMBERS[inner]}"
                return list(
                    struct.unpack_from(code, self._content, self._take(struct.calcsize(code)))
                )
            return [self._value(inner, inside=True) for _ in range(length)]
        if kind not in NUMBERS:
            raise self._damaged(f"a field of it is of type {kind}")
        return self._number(NUMBERS[kind])

    def _info(self) -> tuple[str, list[int], int, int]:
        name, n_dims = self._text(MAX_NAME), self._number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._damaged(f"the tensor {name!r} has {n_dims} dimensions")
        dims = [self._number("Q") for _ in range(n_dims)]
        return name, dims, self._number("I"), self._number("Q")


def _alignment(fields: Mapping[str, Any], path: Path) -> int:
    value = fields.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 8 <= value <= 2**16 or value % 8:
        raise CheckpointError(f"{path} cannot be used: general.alignment is {value!r:.40}")
    return value


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _spans(
    infos: list[tuple[str, list[int], int, int]], start: int, size: int, path: Path
) -> dict[str, Span]:
    """Each tensor's place, if all lie in the file and none on another."""
    spans: dict[str, Span] = {}
    for name, dims, kind, offset in infos:
        if kind not in FORMS:
            known = ", ".join(form.name for form in FORMS.values())
            raise CheckpointError(
                f"{path} cannot be used: {name!r} is of GGUF type {kind}, which is not one of "
                f"{known}"
            )
        form = FORMS[kind]
        whole = all(1 <= dim < 2**40 for dim in dims) and dims[0] % form.block == 0
        span = Span(form, tuple(reversed(dims)), start + offset)
        if name in spans or not whole or span.begin + span.num_bytes > size:
            raise CheckpointError(
                f"{path} is cut short or damaged at the tensor {name!r}: {form.name} of {dims}"
            )
        spans[name] = span
    position = start
    ordered = dict(sorted(spans.items(), key=lambda item: item[1].begin))
    for name, span in ordered.items():
        if span.begin < position:
            raise CheckpointError(f"{path} is damaged: {name!r} lies on another tensor")
        position = span.begin + span.num_bytes
    return ordered
