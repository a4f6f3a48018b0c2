"""What decoding keeps: attention declares *streams*, and everyone else reads that declaration.

A stream is one row of numbers per token (or per several tokens). The contiguous cache here, the
calculators in ``sizing`` and the ladder's report all use ``Stream``; no cache formula stands twice.

Shapes: B batch, T new tokens, S all tokens so far, W stream width.
"""

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
class LayerCache:
    """One layer's part of a :class:`Cache`: the streams of its attention, row ``slot`` per token.

    A stream kept whole has one slot per position. A windowed stream is a ring: position ``p`` lives
    in slot ``p % window``, and ``slot_positions`` says which position a slot holds (-1: none).
    """

    buffers: list[Tensor]  # [B, capacity, W] each
    window: int | None
    slot_positions: Tensor | None = None  # [B, window], only with a window

    def append(
        self, positions_BT: Tensor, total: int, new: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Store the new rows at their positions; return ``(key_positions_BS, streams_BSW)``.

        ``total`` is the number of positions in use after this call, a host integer.
        """
        if self.window is None:
            return self._append_whole(positions_BT, total, new)
        return self._append_ring(positions_BT, new)

    def _append_whole(
        self, positions_BT: Tensor, total: int, new: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        rows = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        for buffer, rows_new in zip(self.buffers, new, strict=True):
            buffer[rows, positions_BT] = rows_new.to(buffer.dtype)
        keys = torch.arange(total, device=positions_BT.device).expand(positions_BT.shape[0], -1)
        return keys, [buffer[:, :total] for buffer in self.buffers]

    def _append_ring(
        self, positions_BT: Tensor, new: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The old window and the new rows side by side, then the new rows take their slots."""
        assert self.window is not None
        assert self.slot_positions is not None
        keys = torch.cat([self.slot_positions, positions_BT], dim=1)
        streams = [
            torch.cat([buffer, rows_new.to(buffer.dtype)], dim=1)
            for buffer, rows_new in zip(self.buffers, new, strict=True)
        ]
        rows = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        last = slice(max(positions_BT.shape[1] - self.window, 0), None)  # a slot is written once
        slots = positions_BT[:, last] % self.window
        self.slot_positions[rows, slots] = positions_BT[:, last]
        for buffer, rows_new in zip(self.buffers, new, strict=True):
            buffer[rows, slots] = rows_new[:, last].to(buffer.dtype)
        return keys, streams


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
            _layer_cache(streams, batch_size, capacity, torch.device(device), dtype)
            for streams in layers
        ]

    def rows(self, start: int, stop: int) -> "Cache":
        """A view of some rows with a length of its own: prompts of unequal length prefill alone."""
        part = object.__new__(Cache)
        part.capacity, part.length = self.capacity, 0
        part.layers = [
            LayerCache(
                [b[start:stop] for b in layer.buffers],
                layer.window,
                None if layer.slot_positions is None else layer.slot_positions[start:stop],
            )
            for layer in self.layers
        ]
        return part

    @property
    def num_bytes(self) -> int:
        """Bytes held, all layers and rows."""
        return sum(b.numel() * b.element_size() for layer in self.layers for b in layer.buffers)


def _layer_cache(
    streams: Sequence[Stream], batch: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> LayerCache:
    windows = {stream.window for stream in streams}
    assert len(windows) == 1, "one layer's streams are kept equally far back"
    window = windows.pop()
    if window is not None and window >= capacity:
        window = None
    slots = window or capacity
    buffers = [
        torch.zeros(
            batch,
            slots,
            stream.width,
            device=device,
            dtype=getattr(torch, stream.dtype) if stream.dtype else dtype,
        )
        for stream in streams
    ]
    positions = None
    if window is not None:
        positions = torch.full((batch, window), -1, device=device, dtype=torch.int64)
    return LayerCache(buffers, window, positions)
