"""Entries: rows that stand for ``size`` tokens each, one every ``stride`` tokens of a document.

MoBA's block means and NSA's compressed keys are entries. Entry i of a document stands for its
tokens ``[i * stride, i * stride + size)`` and exists once the last of them is there. The grid
restarts at every packed document, and decoding makes an entry in the step that completes it.

Shapes: B batch, T new tokens, S rows that ``Step.append`` gives, M entries made in this step, E
entries so far, W width of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.layers.step import Step


@dataclass(frozen=True)
class Entries:
    """The entries of one step.

    Args:
        size: tokens of an entry.
        firsts_BM: where the first token of each entry to make stands among the S rows.
        positions_BM: its position in its document.
        numbers_BM: which entries they are, for the cache.
        lows_BT: the first entry of each token's document, among the E; int32.
        highs_BT: the first entry that is not complete at each token; int32.
        total: E, a host integer.

    No token sees an entry that is not complete, so some of the M may hold anything: decoding makes
    as many as could be needed, and packed documents leave room for as many as could be there.
    """

    size: int
    firsts_BM: Tensor
    positions_BM: Tensor
    numbers_BM: Tensor
    lows_BT: Tensor
    highs_BT: Tensor
    total: int

    @classmethod
    def of(cls, step: Step, size: int, stride: int, source: str) -> "Entries":
        """The entries over the rows of stream ``source``, which holds at least ``size`` tokens."""
        if step.cache is None and step.cu_seqlens is not None:
            return cls._packed(step, size, stride)
        positions_BT, places_BT = step.positions_BT, step.places(source)
        length = positions_BT.shape[1]
        before_B1 = complete(positions_BT[:, :1], size, stride)
        highs_BT = complete(positions_BT + 1, size, stride).to(torch.int32)
        total = max((step.total - size) // stride + 1, 0)
        made = total if step.cache is None else (length - 1) // stride + 1
        numbers_BM = before_B1 + torch.arange(made, device=positions_BT.device)
        positions_BM = numbers_BM * stride
        firsts_BM = positions_BM + (places_BT - positions_BT)[:, :1]
        lows_BT = torch.zeros_like(highs_BT)
        return cls(size, firsts_BM, positions_BM, numbers_BM, lows_BT, highs_BT, total)

    @classmethod
    def _packed(cls, step: Step, size: int, stride: int) -> "Entries":
        positions_BT = step.positions_BT
        batch, length = positions_BT.shape
        room = length // stride  # documents of n tokens have at most n / stride entries
        grown = positions_BT + 1 - size
        ends_BT = (grown >= 0) & (grown % stride == 0)
        highs_BT = ends_BT.cumsum(dim=1)
        slots_BT = torch.where(ends_BT, highs_BT - 1, room)  # what ends nothing goes past the last
        places_BT = torch.arange(length, device=positions_BT.device).expand(batch, -1)
        firsts = places_BT.new_zeros(batch, room + 1).scatter(1, slots_BT, places_BT + 1 - size)
        firsts_BM = firsts[:, :room]
        return cls(
            size,
            firsts_BM,
            positions_BT.gather(1, firsts_BM),
            torch.arange(room, device=positions_BT.device).expand(batch, -1),
            (highs_BT - complete(positions_BT + 1, size, stride)).to(torch.int32),
            highs_BT.to(torch.int32),
            room,
        )

    def tokens(self, rows_BSW: Tensor) -> Tensor:
        """The rows of each entry's tokens, ``[B, M, size, W]``."""
        index = self.firsts_BM[..., None] + torch.arange(self.size, device=rows_BSW.device)
        index = index.clamp(max=rows_BSW.shape[1] - 1)
        batch = torch.arange(rows_BSW.shape[0], device=rows_BSW.device)[:, None, None]
        return rows_BSW[batch, index]

    def append(self, step: Step, *new: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Keep the entries that were made; returns the E of each stream, ``[B, E, W]``."""
        if step.cache is None:
            return new
        _, streams = step.cache.append(self.numbers_BM, self.total, new, names)
        return tuple(streams)


def complete(lengths: Tensor, size: int, stride: int) -> Tensor:
    """How many entries documents of these lengths have."""
    return ((lengths - size) // stride + 1).clamp(min=0)
