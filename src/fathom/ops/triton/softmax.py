"""What all attention kernels share: rows in and out, and the online softmax (arXiv:2205.14135).

Exponentials are in base 2: scores come multiplied by ``scale * log2(e)``. A row that sees nothing
keeps a maximum of ``-inf`` and a sum of 0; its ``lse`` is ``+inf``, so that a backward finds
weights of exactly 0 for it.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: keys and rows of a tile, warps, stages of its pipeline."""

    keys: int
    rows: int
    warps: int
    stages: int

    def options(self, *, rows: bool = True) -> dict[str, int]:
        sizes = {"KEYS": self.keys} | ({"ROWS": self.rows} if rows else {})
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


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
