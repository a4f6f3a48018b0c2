"""Tensors that several processes hold in parts: written where they are, read back in any layout.

A file of tensors is one safetensors file; or, where several ranks saved, one per rank, whose header
says which part of each whole tensor it holds. A reader asks for any part of a whole, so a
checkpoint of one layout loads under every other.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Index = tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not one of ours (exit code 3)."""


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor: the whole's ``[start : start + tensor.shape]`` in every dim.

    Args:
        tensor: this rank's numbers; may be empty.
        shape: of the whole.
        start: where the part begins in it.
        write: whether this rank saves it; of ranks that hold the same part exactly one does.
    """

    tensor: Tensor
    shape: Index
    start: Index
    write: bool = True


def whole(tensor: Tensor, *, write: bool = True) -> Part:
    """A tensor that this rank holds all of; of several that do, one writes."""
    return Part(tensor, tuple(tensor.shape), (0,) * tensor.ndim, write)


def cut(tensor: Tensor, *, dim: int, index: int, parts: int, size: int, write: bool = True) -> Part:
    """Part ``index`` of ``parts`` along ``dim``, whose whole length is ``size``.

    The cuts are those of ``torch.chunk``: equal, the last one shorter or empty.
    """
    start = min(index * math.ceil(size / parts), size)
    shape = [size if at == dim else length for at, length in enumerate(tensor.shape)]
    starts = [start if at == dim else 0 for at in range(tensor.ndim)]
    return Part(tensor, tuple(shape), tuple(starts), write)


def part_path(path: Path, rank: int) -> Path:
    """The file of one rank of several."""
    return path.with_name(f"{path.stem}.rank-{rank:05d}{path.suffix}")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Part], *, rank: int = 0, ranks: int = 1
) -> None:
    """Write this rank's tensors as they are now; of several ranks each calls it.

    A plain tensor is whole, and rank 0 writes it.
    """
    parts = {name: _as_part(item, rank) for name, item in tensors.items()}
    mine = {name: part for name, part in parts.items() if part.write}
    file, about = path, None
    if ranks > 1:
        file = part_path(path, rank)
        places = {name: [part.shape, part.start] for name, part in mine.items()}
        about = {"parts": json.dumps(places, sort_keys=True)}
    content = {name: part.tensor.detach().contiguous() for name, part in mine.items()}
    save_file(content, file, metadata=about)
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read it


def _as_part(item: Tensor | Part, rank: int) -> Part:
    return item if isinstance(item, Part) else whole(item, write=rank == 0)


class Stored:
    """Tensors on the disk, whoever wrote them: names, shapes, and any part of each."""

    def __init__(self, path: Path, files: list[Any]) -> None:
        self.path = path
        self.shapes: dict[str, Index] = {}
        self.pieces: dict[str, list[tuple[Any, Index, Index]]] = {}  # file, start, shape
        for file in files:
            places = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118  no dict
                shape = tuple(file.get_slice(name).get_shape())
                about = places.get(name, [shape, [0] * len(shape)])
                self.shapes[name] = tuple(about[0])
                self.pieces.setdefault(name, []).append((file, tuple(about[1]), shape))

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, ..."""
        return self.pieces[name][0][0].get_slice(name).get_dtype()

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        """The part of ``shape`` that begins at ``start``.

        Raises:
            CheckpointError: the files do not hold every number of it exactly once.
        """
        into, filled = None, 0
        for file, at, size in self.pieces[name]:
            if (at, size) == (start, shape):
                return file.get_tensor(name)
            low = [max(a, b) for a, b in zip(at, start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, size, start, shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                piece = file.get_slice(name)[_slices(low, high, at)]
                into = piece.new_empty(shape) if into is None else into
                into[_slices(low, high, start)] = piece
                filled += piece.numel()
        if into is None or filled != into.numel():
            raise CheckpointError(f"{self.path} is damaged: parts of {name} are missing")
        return into


def _slices(low: list[int], high: list[int], origin: Index) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


@contextmanager
def opened(path: Path) -> Iterator[Stored]:
    """The tensors of a file; or of the files of all ranks, if several wrote it.

    Raises:
        CheckpointError: it is not there, or is no safetensors file.
    """
    files = [path] if path.exists() else _part_files(path)
    try:
        with ExitStack() as stack:
            handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            yield Stored(path, handles)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _part_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.rank-*{path.suffix}")) or [path]


def tensor_shapes(path: Path) -> dict[str, Index]:
    """Name and whole shape of every tensor, from the headers alone."""
    with opened(path) as stored:
        return stored.shapes


def check_whole(path: Path) -> None:
    """That the ranks wrote every number of every tensor exactly once, by their count."""
    with opened(path) as stored:
        for name, shape in stored.shapes.items():
            written = sum(math.prod(size) for _, _, size in stored.pieces[name])
            assert written == math.prod(shape), f"{name}: {written} of {math.prod(shape)} written"


def copy_tensors(path: Path, into: Mapping[str, Tensor | Part]) -> None:
    """Copy what is stored into the tensor, or the part, of its name, one at a time.

    Raises:
        CheckpointError: the names or shapes are not the same.
    """
    with opened(path) as stored, torch.no_grad():
        if set(stored.shapes) != set(into):
            odd = min(set(stored.shapes) ^ set(into))
            raise CheckpointError(f"{path} does not fit: it and the run differ in {odd}")
        for name, item in into.items():
            part = _as_part(item, 0)
            if stored.shapes[name] != part.shape:
                there, here = list(stored.shapes[name]), list(part.shape)
                raise CheckpointError(f"{path} does not fit: {name} is {there}, not {here}")
            if part.tensor.numel():
                part.tensor.copy_(stored.read(name, part.start, tuple(part.tensor.shape)))
