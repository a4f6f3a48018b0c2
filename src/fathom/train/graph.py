"""Forward and backward as one CUDA graph: a step is launched once, and not kernel by kernel.

A small model's kernels end sooner than the host can launch the next. A CUDA graph remembers all
launches of a pass over a micro-batch with their addresses; replaying it reads new tokens from the
same place and leaves gradients and losses in the same places.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathom.ffn import Routing
from fathom.model import Losses

Pass = Callable[[Sequence[Tensor], Tensor], Losses]  # of inputs and the losses' denominator


@dataclass(frozen=True)
class Recorded:
    """A graph, where it reads, and where it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    denominator: Tensor
    grads: list[Tensor | None]
    losses: Losses


class GradientGraphs:
    """A graph for each shape of micro-batch and ``kind`` of pass.

    A graph's gradients are its own. Where several micro-batches add up, all graphs add to the same
    gradients, which the first of a step sets to zero.

    Args:
        parameters: whose gradients the passes make.
        add_up: whether a step has several micro-batches.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, add_up: bool) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.shared = [torch.zeros_like(p) for p in self.parameters] if add_up else None
        self.recorded: dict[Hashable, Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, run: Pass, inputs: Sequence[Tensor], denominator: int, *, kind: Hashable, first: bool
    ) -> Losses:
        """``run``, which is forward and backward, on new inputs: its losses and the gradients.

        Args:
            run: recorded when its ``kind`` or the inputs' shapes are new.
            inputs: tokens, targets, borders of documents, and any more.
            denominator: of the losses' mean.
            kind: all else that the pass depends on.
            first: of the micro-batches that add up.
        """
        tokens_BT, targets_BT, cu_seqlens, *more = inputs
        inputs = [tokens_BT, targets_BT, rounded(cu_seqlens, rows=len(tokens_BT)), *more]
        name = (kind, *(tensor.shape for tensor in inputs))
        if name not in self.recorded:
            self.recorded[name] = self.record(run, inputs)
        recorded = self.recorded[name]
        for place, new in zip(recorded.inputs, inputs, strict=True):
            place.copy_(new, non_blocking=True)
        recorded.denominator.fill_(denominator)
        if self.shared is not None and first:
            torch._foreach_zero_(self.shared)  # pyright: ignore[reportPrivateImportUsage]
        recorded.graph.replay()
        for parameter, grad in zip(self.parameters, recorded.grads, strict=True):
            parameter.grad = grad
        return recorded.losses if self.shared is None else copied(recorded.losses)

    def record(self, run: Pass, inputs: Sequence[Tensor]) -> Recorded:
        """Record a pass, after one that lets kernels compile and choose; gradients stay as were."""
        device = self.parameters[0].device
        places = [tensor.clone() for tensor in inputs]
        denominator = torch.ones((), device=device)
        self.set_gradients(None)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run(places, denominator)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.set_gradients(self.shared)
        torch.cuda.empty_cache()  # for the graph's own pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            losses = copied(run(places, denominator))
        return Recorded(graph, places, denominator, [p.grad for p in self.parameters], losses)

    def set_gradients(self, grads: Sequence[Tensor] | None) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None if grads is None else grads[index]


def rounded(cu_seqlens: Tensor, *, rows: int) -> Tensor:
    """As many borders as a power of two, the last ones of empty documents; one a row stays so."""
    count = len(cu_seqlens)
    more = (1 << (count - 1).bit_length()) - count
    if count == rows + 1 or not more:
        return cu_seqlens
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(more)])


def copied(losses: Losses) -> Losses:
    """The values alone, which the next pass leaves as they are."""

    def copy(value: Tensor) -> Tensor:
        return value.detach().clone()

    return Losses(
        total=copy(losses.total),
        main=copy(losses.main),
        mtp=copy(losses.mtp),
        balance=copy(losses.balance),
        index=copy(losses.index),
        routing=[Routing(*map(copy, one[:3])) for one in losses.routing],  # one process: no reach
    )
