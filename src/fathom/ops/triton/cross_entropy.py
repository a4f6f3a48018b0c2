"""The kernel between the products of ``ops/cross_entropy.py``: logits to losses and slopes.

One program a row. The first pass finds the row's maximum and sum (an online softmax), the second
reads the row again, from cache if it is not too long, and leaves ``softmax - one_hot`` in its
place: each logit is read from memory once or twice and written once.

Shapes: M rows, V vocabulary.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a row in registers


@triton.jit
def _losses_and_slopes(
    logits_MV, targets_M, losses_M, width, ignore, SLOPES: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_MV + row * width
    target = tl.load(targets_M + row)
    valid = target != ignore
    # Before the first reduction, whose barrier keeps it ahead of every store below.
    chosen = tl.load(logits + tl.where(valid, target, 0)).to(tl.float32)
    top = float("-inf")
    others = 0.0  # without the target's own: its slope is -others / total, without a cancellation
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        part = tl.where(column == target, 0.0, tl.exp(x - higher))
        others = others * tl.exp(top - higher) + tl.sum(part, axis=0)
        top = higher
    total = others + tl.exp(chosen - top)
    tl.store(losses_M + row, tl.where(valid, top + tl.log(total) - chosen, 0.0))
    if SLOPES:
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(column == target, -others, tl.exp(x - top)) / total
            slope = tl.where(valid, slope, 0.0)
            tl.store(logits + column, slope.to(logits_MV.dtype.element_ty), mask=inside)


def losses_and_slopes(
    logits_MV: Tensor, targets_M: Tensor, losses_M: Tensor, ignore: int, *, slopes: bool
) -> None:
    """Write each row's loss; with ``slopes`` its gradient over the logits. 0 where ignored.

    Args:
        logits_MV: contiguous; overwritten by ``softmax - one_hot(target)`` if asked.
        targets_M: int64.
        losses_M: float32.
        ignore: the target that is none.
        slopes: whether the gradient is wanted.
    """
    rows, width = logits_MV.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    if rows:
        _losses_and_slopes[(rows,)](
            logits_MV,
            targets_M,
            losses_M,
            width,
            ignore,
            SLOPES=slopes,
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
