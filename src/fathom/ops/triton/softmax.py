"""What all attention kernels share: rows in and out, the online softmax (arXiv:2205.14135), sizes.

Exponentials are in base 2: scores come multiplied by ``scale * log2(e)``. A row that sees nothing
keeps a maximum of ``-inf`` and a sum of 0; its ``lse`` is ``+inf``, so that a backward finds
weights of exactly 0 for it.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: keys and rows of a tile, warps, stages of its pipeline."""

    keys: int
    rows: int
    warps: int
    stages: int

    def options(self, keys: str = "KEYS", rows: str | None = "ROWS") -> dict[str, int]:
        """What a kernel is launched with that calls its sizes so."""
        sizes = {keys: self.keys} | ({rows: self.rows} if rows else {})
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


def padded(size: int) -> int:
    """What a side of a matrix product is padded to."""
    return max(triton.next_power_of_2(size), 16)


def group_sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    """Constants of a kernel whose rows are heads that share a key head, by their names."""
    rows, width = q.shape[2] // k.shape[2], q.shape[3]
    sizes = {"H": q.shape[2], "G": k.shape[2], "R": rows, "RP": triton.next_power_of_2(rows)}
    return sizes | {"Q": width, "QP": padded(width)}


def key_rows(*tensors_BSGW: Tensor) -> tuple[int, list[Tensor]]:
    """How many keys each batch row has room for, and the tensors, which then have that much.

    The filled part of a cache stands in one piece for each batch row, with the rest behind it: no
    reason to copy it. What stands otherwise is copied.
    """
    rooms = {t.stride(0) // t[0, 0].numel() if t[0].is_contiguous() else 0 for t in tensors_BSGW}
    if len(rooms) == 1 and (room := rooms.pop()):
        return room, list(tensors_BSGW)
    return tensors_BSGW[0].shape[1], [t.contiguous() for t in tensors_BSGW]


@triton.jit
def online_softmax(scores, top, total):
    """One more tile ``[rows, keys]``: its weights, the new maximum and sum, and what earlier sums
    are to be multiplied by."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    return weights, new_top, total * shrink + tl.sum(weights, 1), shrink


@triton.jit
def finish_softmax(acc, top, total):
    """The mean of the values and the log2 of the sum of exponentials."""
    seen = total > 0.0
    divisor = tl.where(seen, total, 1.0)
    return acc / divisor[:, None], tl.where(seen, top + tl.log2(divisor), float("inf"))


@triton.jit
def load_rows(base, rows, W: tl.constexpr, WP: tl.constexpr):
    """``[rows, WP]``: rows of width W that stand one after the other, padded with zeros."""
    cols = tl.arange(0, WP)
    at = base + rows.to(tl.int64)[:, None] * W + cols
    if W == WP:
        return tl.load(at)
    else:
        return tl.load(at, mask=cols[None, :] < W, other=0.0)


@triton.jit
def store_rows(base, rows, there, values, W: tl.constexpr, WP: tl.constexpr):
    """The inverse for the rows that are there."""
    cols = tl.arange(0, WP)
    mask = there[:, None] & (cols < W)
    at = base + rows.to(tl.int64)[:, None] * W + cols
    tl.store(at, values.to(base.dtype.element_ty), mask=mask)
