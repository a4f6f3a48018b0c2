"""What decoding keeps: attention declares *streams*, and everyone else reads that declaration.

A stream is one row of numbers per token (or per several tokens). The contiguous cache here, the
calculators in ``sizing`` and the ladder's report all use ``Stream``; no cache formula stands twice.

Shapes: B batch, T new tokens (or entries), S all tokens (or entries) so far, W stream width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class Stream:
    """One thing that decoding must keep.

    Args:
        name: what it is (``k``, ``v``, ``latent``, ...).
        width: numbers per entry.
        dtype: a name of ``DTYPE_BYTES``, or None for the cache's own.
        tokens_per_entry: 1; more where one entry stands for several tokens.
        window: how many of the newest tokens are kept; None keeps all.
    """

    name: str
    width: int
    dtype: str | None = None
    tokens_per_entry: int = 1
    window: int | None = None

    def num_bytes(self, seq_len: int, cache_dtype: str = "bfloat16") -> int:
        """Bytes of one sequence's entries after ``seq_len`` tokens."""
        kept = seq_len if self.window is None else min(seq_len, self.window)
        return kept // self.tokens_per_entry * self.width * DTYPE_BYTES[self.dtype or cache_dtype]


@dataclass
class Store(ABC):
    """The rows of one stream."""

    buffer: Tensor  # [B, slots, W]

    @abstractmethod
    def append(
        self, positions_BT: Tensor, total: int, new_BTW: Tensor, *, aligned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows at their positions; return ``(key_positions_BS, stream_BSW)``.

        Args:
            positions_BT: of the new rows.
            total: positions in use after this call, a host integer.
            new_BTW: the rows.
            aligned: the positions are the last of ``total`` in every row.
        """

    @abstractmethod
    def places(self, positions_BT: Tensor) -> Tensor:
        """Where the newly appended rows stand among the S that ``append`` returns."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> "Store":
        """A view of some rows of the batch."""


@dataclass
class Whole(Store):
    """A slot for every position."""

    numbers: Tensor  # [slots], 0, 1, ...: the positions of the slots

    def append(
        self, positions_BT: Tensor, total: int, new_BTW: Tensor, *, aligned: bool = False
    ) -> tuple[Tensor, Tensor]:
        batch, length = positions_BT.shape
        if aligned:
            self.buffer[:, total - length : total] = new_BTW
        else:
            rows = torch.arange(batch, device=positions_BT.device)[:, None]
            self.buffer[rows, positions_BT] = new_BTW.to(self.buffer.dtype)
        return self.numbers[:total].expand(batch, -1), self.buffer[:, :total]

    def places(self, positions_BT: Tensor) -> Tensor:
        return positions_BT

    def rows(self, start: int, stop: int) -> "Whole":
        return Whole(self.buffer[start:stop], self.numbers)


@dataclass
class Ring(Store):
    """The newest ``window`` positions: position ``p`` lives in slot ``p % window``."""

    slot_positions: Tensor  # [B, window], which position a slot holds; -1: none

    @property
    def window(self) -> int:
        return self.buffer.shape[1]

    def append(
        self, positions_BT: Tensor, total: int, new_BTW: Tensor, *, aligned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The window before the new rows, oldest first, then they; the new rows take their slots.

        A position of -1 in the result marks a row that does not exist.
        """
        batch = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        wanted = positions_BT[:, :1] + torch.arange(-self.window, 0, device=batch.device)
        slots = wanted % self.window
        old = torch.where(self.slot_positions[batch, slots] == wanted, wanted, -1)
        keys = torch.cat([old, positions_BT], dim=1)
        new = new_BTW.to(self.buffer.dtype)
        stream = torch.cat([self.buffer[batch, slots], new], dim=1)
        last = slice(max(positions_BT.shape[1] - self.window, 0), None)  # a slot is written once
        slots = positions_BT[:, last] % self.window
        self.slot_positions[batch, slots] = positions_BT[:, last]
        self.buffer[batch, slots] = new[:, last]
        return keys, stream

    def places(self, positions_BT: Tensor) -> Tensor:
        batch, length = positions_BT.shape
        return torch.arange(length, device=positions_BT.device).expand(batch, -1) + self.window

    def rows(self, start: int, stop: int) -> "Ring":
        return Ring(self.buffer[start:stop], self.slot_positions[start:stop])


@dataclass
class LayerCache:
    """One layer's part of a :class:`Cache`: a store for each stream of its attention, by name."""

    stores: dict[str, Store]

    def append(
        self,
        positions_BT: Tensor,
        total: int,
        new: Sequence[Tensor],
        names: Sequence[str] | None = None,
        *,
        aligned: bool = False,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Store new rows of some streams that are kept alike; ``(key_positions_BS, streams)``.

        ``names`` says of which streams; None: of all, in the order of their declaration.
        """
        names = list(self.stores) if names is None else names
        pairs = [
            self.stores[name].append(positions_BT, total, rows, aligned=aligned)
            for name, rows in zip(names, new, strict=True)
        ]
        assert len({keys.shape for keys, _ in pairs}) == 1, "these streams are not kept alike"
        return pairs[0][0], [stream for _, stream in pairs]

    def rows(self, start: int, stop: int) -> "LayerCache":
        """A view of some rows of the batch."""
        return LayerCache({name: store.rows(start, stop) for name, store in self.stores.items()})


class Cache:
    """The plain contiguous cache of a whole model.

    Args:
        layers: the streams of each layer, as its attention declares them.
        batch_size: rows.
        capacity: positions that can be stored.

    ``length`` is the number of positions in use, over the longest row: a host integer, so that
    decoding never waits for the device. Rows may be shorter; their unused slots are never visible.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Stream]],
        *,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = [
            LayerCache({s.name: _store(s, batch_size, capacity, device, dtype) for s in streams})
            for streams in layers
        ]

    def rows(self, start: int, stop: int) -> "Cache":
        """A view of some rows with a length of its own: prompts of unequal length prefill alone."""
        part = object.__new__(Cache)
        part.capacity, part.length = self.capacity, 0
        part.layers = [layer.rows(start, stop) for layer in self.layers]
        return part

    @property
    def num_bytes(self) -> int:
        """Bytes held, all layers and rows."""
        stores = [store for layer in self.layers for store in layer.stores.values()]
        return sum(store.buffer.numel() * store.buffer.element_size() for store in stores)


def _store(
    stream: Stream, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype
) -> Store:
    held = getattr(torch, stream.dtype) if stream.dtype else dtype

    def buffer(slots: int) -> Tensor:
        return torch.zeros(batch, slots, stream.width, device=device, dtype=held)

    if stream.window is None or stream.window >= capacity:
        slots = -(-capacity // stream.tokens_per_entry)
        return Whole(buffer(slots), torch.arange(slots, device=device))
    slot_positions = torch.full((batch, stream.window), -1, device=device, dtype=torch.int64)
    return Ring(buffer(stream.window), slot_positions)
