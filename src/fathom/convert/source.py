"""Where tensors come from: names, shapes and types first, then one tensor at a time.

``TensorSource`` is all that loading, converting and saving know of a file format. The source here
is a folder of safetensors, mapped into memory. Its headers come from strangers: they are parsed by
this module, and every size is checked against the file before a byte of a tensor is used.

Format: 8 bytes little-endian length n, n bytes of JSON (name to dtype, shape and byte range), then
the tensors' bytes, without gaps (github.com/huggingface/safetensors, "Format").
"""

import math
import mmap
import os
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fathom.convert.files import exists, is_plain, open_inside, parse_object, read_object
from fathom.convert.run_folder import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_FILES = 1000  # each stays open
MAX_DIMS = 8
Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


@dataclass(frozen=True)
class Entry:
    """What is known of a stored tensor before it is read.

    Args:
        shape: of the tensor that ``read`` gives.
        dtype: of the tensor that ``read`` gives.
        num_bytes: that it takes in its file, for progress and for disk space.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


class TensorSource(ABC):
    """Named tensors of one checkpoint. Sources wrap sources, to rename or to dequantise."""

    @property
    @abstractmethod
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor, in the order in which they are best read."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, not to be written to: it may be the file itself.

        Several threads may read at once.

        Raises:
            CheckpointError: its content cannot be used.
        """

    def release(self, name: str) -> None:  # noqa: B027  most sources hold nothing
        """What ``read`` gave is no longer used: its memory may go."""


class SafetensorsFile:
    """One file: its header checked, its content mapped.

    Raises:
        CheckpointError: damaged, cut short, or of types that this version does not know.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        with open_inside(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            header, self._start = _header(file, size, self.path)
            self._spans = _spans(header, size - self._start, self.path)
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise CheckpointError(f"cannot map {self.path}: {error.strerror}") from None
        self.entries = {name: entry for name, (entry, _) in self._spans.items()}
        with warnings.catch_warnings():  # torch warns that the bytes cannot be written to
            warnings.simplefilter("ignore")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        entry, begin = self._spans[name]
        flat = self._bytes[self._start + begin :][: entry.num_bytes]
        if flat.storage_offset() % entry.dtype.itemsize:
            flat = flat.clone()
        return flat.view(entry.dtype).view(entry.shape)

    def release(self, name: str) -> None:
        """Take the tensor's pages out of this process; the system's file cache keeps them."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        entry, begin = self._spans[name]
        first = -(-(self._start + begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (self._start + begin + entry.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


def _header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where the tensors begin."""
    length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path} is no whole safetensors file: its header does not fit")
    content = file.read(length)
    tensors = content.count(b"data_offsets")
    if content.count(b"[") > 2 * tensors or content.count(b"{") > tensors + 2:  # none is so rich
        raise CheckpointError(f"{path} cannot be used: its header is no list of tensors")
    header = parse_object(content, f"the header of {path}")
    header.pop("__metadata__", None)
    return header, 8 + length


def _spans(header: dict[str, Any], size: int, path: Path) -> dict[str, tuple[Entry, int]]:
    """Each tensor and where it begins, in the order of the file, which they fill without gaps."""
    found = {name: _span(name, fields, path) for name, fields in header.items()}
    spans = dict(sorted(found.items(), key=lambda item: (item[1][1], item[1][0].num_bytes)))
    position = 0
    for name, (entry, begin) in spans.items():
        if begin != position:
            raise CheckpointError(f"{path} is damaged: {name!r} does not begin where one ends")
        position += entry.num_bytes
    if position != size:
        raise CheckpointError(
            f"{path} is cut short or damaged: its header describes {position:,} bytes of tensors, "
            f"it holds {size:,}"
        )
    return spans


def _span(name: str, fields: Any, path: Path) -> tuple[Entry, int]:
    """A tensor and where it begins, if what the header says of it can be true."""
    try:
        label, shape, (begin, end) = (fields[k] for k in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, begin, end]
    except (TypeError, ValueError, KeyError):
        raise CheckpointError(f"{path} is damaged at the tensor {name[:200]!r}") from None
    whole = all(type(n) is int and 0 <= n < 2**60 for n in numbers)
    if not whole or not name or len(fields) != 3 or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{path} is damaged at the tensor {name[:200]!r}")
    if not isinstance(label, str) or label not in DTYPES:
        raise CheckpointError(
            f"{path} cannot be used: {name[:200]!r} is of type {str(label)[:40]!r}, which is not "
            f"one of {', '.join(DTYPES)}"
        )
    entry = Entry(tuple(shape), DTYPES[label], math.prod(shape) * DTYPES[label].itemsize)
    if end - begin != entry.num_bytes:
        raise CheckpointError(f"{path} is damaged: the size of {name[:200]!r} is not its shape's")
    return entry, begin


class FolderSource(TensorSource):
    """A folder with one safetensors file, or many and an index whose ``weight_map`` decides.

    Args:
        folder: the folder.
        files: the names of the files, each of whose tensors are all used; None: as Hugging Face
            names them.

    Raises:
        CheckpointError: there are none, they cannot be used, or the index is not true.
    """

    def __init__(self, folder: Path, files: list[str] | None = None) -> None:
        self.folder = folder
        weight_map = None if files else _weight_map(folder)
        names = files or (sorted(set(weight_map.values())) if weight_map else [SINGLE])
        opened = {name: SafetensorsFile(folder, name) for name in names}
        self._home = {
            tensor: file
            for name, file in opened.items()
            for tensor in file.entries
            if weight_map is None or weight_map.get(tensor) == name
        }
        for tensor, name in (weight_map or {}).items():
            if tensor not in self._home:
                raise CheckpointError(
                    f"{folder / name} lacks the tensor {tensor!r}, which {INDEX} says it holds"
                )
        self._entries = {name: file.entries[name] for name, file in self._home.items()}

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self._home[name].read(name)

    def release(self, name: str) -> None:
        self._home[name].release(name)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file holds which tensor, from the index; None: one file holds all."""
    if exists(folder, SINGLE):
        return None
    if not exists(folder, INDEX):
        raise CheckpointError(_why_none(folder))
    weight_map = read_object(folder, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} cannot be used: it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX} cannot be used: it says that {tensor[:200]!r} lies in "
                f"{str(name)[:200]!r}, which is no safetensors file inside the folder"
            )
    if len(set(weight_map.values())) > MAX_FILES:
        raise CheckpointError(f"{folder / INDEX} names more than {MAX_FILES:,} files")
    return weight_map


def _why_none(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read: save the "
            "model with safetensors where you trust it, and give that folder"
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX}"
