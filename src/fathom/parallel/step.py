"""What of a training step takes all ranks: gradients, their norm, the update of whole matrices."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fathom.model import Decoder
from fathom.parallel.mesh import Layout, is_expert, local

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule  # slow to import: a run of one process need not


def accumulate(model: nn.Module, layout: Layout, *, last: bool) -> None:
    """Before a backward of several that add up: what of their gradients goes over the wire now.

    Copies are added up once, in the ``last``; parts at once, so that no rank holds them whole.
    """
    if layout.world == 1:
        return
    layout.adds_up = last
    if layout.cfg.shard > 1:
        cast("FSDPModule", model).set_requires_all_reduce(last)


@contextmanager
def in_step(model: Decoder, layout: Layout) -> Iterator[None]:
    """Within it every rank sees rank 0's logits, so that all write the same text together."""

    def take_from_first(_: nn.Module, inputs: object, logits_BTV: Tensor) -> Tensor:
        logits_BTV = logits_BTV.contiguous()
        dist.broadcast(logits_BTV, 0)
        return logits_BTV

    hook = model.register_forward_hook(take_from_first) if layout.world > 1 else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def over_whole(
    do: Callable[[Tensor], Tensor], rows_KmN: Tensor, height: int, group: dist.ProcessGroup
) -> Tensor:
    """``do`` on a stack of K whole matrices, of which each rank holds a range of rows.

    Every rank gets its share of the K whole, and the results travel back: nothing is done twice.

    Args:
        do: ``[k, height, N]`` to the same shape.
        rows_KmN: this rank's rows of each matrix.
        height: rows of a whole one, cut as ``torch.chunk`` does.
        group: the ranks that share them, in the order of the rows.
    """
    n_matrices, _, width = rows_KmN.shape
    shares, heights = cuts(n_matrices, group.size()), cuts(height, group.size())
    mine, rows = shares[group.rank()], heights[group.rank()]
    sent, received = [k * rows * width for k in shares], [mine * m * width for m in heights]
    flat = rows_KmN.new_empty(sum(received))
    dist.all_to_all_single(flat, rows_KmN.flatten(), received, sent, group=group)
    parts = [
        part.view(mine, m, width) for m, part in zip(heights, flat.split(received), strict=True)
    ]
    done_kMN = do(torch.cat(parts, dim=1))
    back = torch.cat([part.flatten() for part in done_kMN.split(heights, dim=1)])
    result = back.new_empty(rows_KmN.numel())
    dist.all_to_all_single(result, back, sent, received, group=group)
    return result.view(rows_KmN.shape)


def cuts(size: int, parts: int) -> list[int]:
    """The sizes of ``torch.chunk``'s pieces, of which the last may be shorter or empty."""
    piece = -(-size // parts)
    return [min(piece, max(size - piece * part, 0)) for part in range(parts)]


def gradient_norm(model: nn.Module, layout: Layout) -> Tensor:
    """The norm of the gradients of all ranks; a part that several hold counts once."""
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            by_copies[n_copies(name, layout)].append(local(weight.grad))
    squares = [
        torch.nn.utils.get_total_norm(grads, foreach=True).double().square() / copies
        for copies, grads in by_copies.items()
    ]
    return layout.sum(torch.stack(squares).sum()).sqrt()


def n_copies(name: str, layout: Layout) -> int:
    """How many ranks hold the same part of a parameter."""
    if is_expert(name, layout):
        return layout.cfg.dp // layout.cfg.expert_shard
    return layout.world // layout.cfg.shard
