"""Copies of parameters on several ranks, whose gradients are added up while the backward runs.

The scheme of PyTorch's DistributedDataParallel (Li et al., arXiv:2006.15704, section 3.2): the
gradients come in reverse, go over the wire in buckets as soon as they are complete, and always in
one order, for ranks must agree on it. Nothing stands around the forward, so blocks compile as in
one process. Large gradients travel as they lie, small ones in one flat copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from fathom.parallel.mesh import Layout

BUCKET = 2**22  # numbers, from which on a bucket travels


@dataclass
class Bucket:
    """Parameters whose gradients travel together.

    Args:
        params: one large, or several small ones.
        group: the ranks that have copies of them.
        missing: gradients that the present backward has not made yet.
    """

    params: list[nn.Parameter]
    group: dist.ProcessGroup
    missing: int


@dataclass
class Sum:
    """Gradients on their way: ``flat`` is what is added up, a copy if there are several."""

    work: dist.Work
    grads: list[Tensor]
    flat: Tensor


class Copies:
    """Adds up the gradients of ``params`` over their group at the end of a step's last backward.

    Its hooks keep it alive as long as the parameters. ``layout.adds_up`` says whether the present
    backward is the last.

    Args:
        layout: of this process.
        params: with the ranks that hold copies of each, in the order of the forward.
    """

    def __init__(
        self, layout: Layout, params: Iterable[tuple[nn.Parameter, dist.ProcessGroup]]
    ) -> None:
        self.layout = layout
        self.buckets = list(in_buckets(reversed(list(params))))
        self.next = 0  # the first bucket that does not travel yet
        self.sums: list[Sum] = []
        self.running = False
        for bucket in self.buckets:
            for param in bucket.params:
                param.register_post_accumulate_grad_hook(self._hook(bucket))

    def _hook(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def made(_: Tensor) -> None:
            if not self.layout.adds_up:
                return
            if not self.running:
                self.running = True
                Variable._execution_engine.queue_callback(self._finish)
            bucket.missing -= 1
            while self.next < len(self.buckets) and not self.buckets[self.next].missing:
                self._send()

        return made

    def _send(self) -> None:
        """The next bucket; a parameter without a gradient has none on any rank."""
        bucket = self.buckets[self.next]
        self.next += 1
        grads = [param.grad for param in bucket.params if param.grad is not None]
        if not grads:
            return
        flat = grads[0] if len(grads) == 1 else torch.cat([grad.flatten() for grad in grads])
        work = dist.all_reduce(flat, group=bucket.group, async_op=True)
        assert work is not None
        self.sums.append(Sum(work, grads, flat))

    def _finish(self) -> None:
        """Send what is left, wait (a GPU does, its host does not), and take back the flat sums."""
        while self.next < len(self.buckets):
            self._send()
        for one in self.sums:
            one.work.wait()
            if len(one.grads) > 1:
                parts = one.flat.split([grad.numel() for grad in one.grads])
                views = [part.view_as(grad) for part, grad in zip(parts, one.grads, strict=True)]
                torch._foreach_copy_(one.grads, views)  # pyright: ignore
        self.sums, self.next, self.running = [], 0, False
        for bucket in self.buckets:
            bucket.missing = len(bucket.params)


def in_buckets(params: Iterable[tuple[nn.Parameter, dist.ProcessGroup]]) -> Iterator[Bucket]:
    """Neighbours of one group and dtype together, up to ``BUCKET`` numbers; larger ones alone."""
    open_ones: dict[tuple[dist.ProcessGroup, torch.dtype], list[nn.Parameter]] = {}
    for param, group in params:
        alike = group, param.dtype
        small = open_ones.setdefault(alike, [])
        if param.numel() >= BUCKET:
            yield bucket([param], group)
            continue
        small.append(param)
        if sum(each.numel() for each in small) >= BUCKET:
            yield bucket(open_ones.pop(alike), group)
    for (group, _), left in open_ones.items():
        if left:
            yield bucket(left, group)


def bucket(params: Sequence[nn.Parameter], group: dist.ProcessGroup) -> Bucket:
    return Bucket(list(params), group, len(params))
