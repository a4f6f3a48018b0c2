"""Experts on several ranks: tokens travel to them and back by all-to-all.

As DeepSeek-V3 trains (arXiv:2412.19437, section 3.2): rank r of R holds experts ``r E/R`` to
``(r+1) E/R - 1``, every rank has its own tokens, and none is dropped, however many an expert gets.
Counts are exchanged once per layer and forward and read by the host, which must know how much to
receive; the way back and both gradients reuse them. While they travel the shared experts compute.

Shapes: N tokens of this rank, K chosen, P = N K rows that leave, Q rows that come, D model dim,
R ranks, E experts, L = E / R of them here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.ffn.experts import Experts
from fathom.ops.permute import Permutation, combine, gather, sort_by_expert
from fathom.ops.registry import autocast

TILE = 128  # channels that share an FP8 scale, as in DeepSeek-V3, section 3.3.2
FP8_MAX = 448.0


class Route(NamedTuple):
    """Who sends how many rows to whom, and their order at the experts.

    Args:
        sent, received: rows to and from each rank.
        arrival: the Q rows, which come by sending rank, put in order of their expert.
        group: the ranks.
        fp8: whether rows travel there as FP8.
    """

    sent: list[int]
    received: list[int]
    arrival: Permutation
    group: dist.ProcessGroup
    fp8: bool


class Arrived(NamedTuple):
    """Rows that came from all ranks, for the experts here, and the way back.

    Args:
        rows_QD: sorted by expert.
        ends_L: end of each expert's rows.
        permutation: which of the rows that left here is whose.
        route: who sent them.
    """

    rows_QD: Tensor
    ends_L: Tensor
    permutation: Permutation
    route: Route


class ExpertParallel:
    """The dispatcher of an MoE whose experts are spread over ``group``."""

    def __init__(self, n_experts: int, group: dist.ProcessGroup, *, fp8: bool = False) -> None:
        self.n_experts, self.group, self.fp8 = n_experts, group, fp8
        self.lane = Lane()

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor) -> "Travelling":
        """Sort the rows by expert and exchange their counts; rows follow when the host has them."""
        permutation = sort_by_expert(expert_ids_NK, self.n_experts)
        (rows_PD,) = autocast(gather(x_ND, permutation, expert_ids_NK.shape[1]))  # as experts will
        sent_RL = permutation.counts.view(self.group.size(), -1)
        received_RL = torch.empty_like(sent_RL)
        with self.lane.beside(rows_PD):
            dist.all_to_all_single(received_RL, sent_RL, group=self.group)
            totals = torch.stack([sent_RL.sum(1), received_RL.sum(1)])
            on_host = totals.to("cpu", non_blocking=True)
            self.lane.mark()
        return Travelling(self, rows_PD, permutation, received_RL, on_host)

    def combine(self, rows_PD: Tensor, gates_NK: Tensor, sent: Arrived) -> Tensor:
        """Send the answers back, and sum each token's by its gates."""
        return combine(_FromExperts.apply(rows_PD, sent.route), gates_NK, sent.permutation)


class Travelling(NamedTuple):
    """Rows whose counts are on their way to the host."""

    by: ExpertParallel
    rows_PD: Tensor
    permutation: Permutation
    received_RL: Tensor
    on_host: Tensor

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 ``[E]``, of the tokens that left here."""
        return self.permutation.counts

    def through(self, experts: Experts, gates_NK: Tensor) -> Tensor:
        """The experts' answers to all that came, back and summed by the gates: ``[N, D]``."""
        sent = self.arrived()
        rows_QD = experts(sent.rows_QD, sent.ends_L)
        return self.by.combine(rows_QD, gates_NK, sent)

    def arrived(self) -> Arrived:
        """Send the rows and take in those for the experts here, sorted by expert."""
        lane = self.by.lane
        lane.wait_for_mark()
        sent, received = self.on_host.tolist()
        with lane.beside(self.rows_PD):
            arrival = order_of_arrival(self.received_RL, sum(received))
            route = Route(sent, received, arrival, self.by.group, self.by.fp8)
            rows_QD = _ToExperts.apply(self.rows_PD, route)
        lane.join(rows_QD, *arrival)
        return Arrived(rows_QD, arrival.ends, self.permutation, route)


def order_of_arrival(received_RL: Tensor, n_rows: int) -> Permutation:
    """How rows that come by rank, of each rank by expert, are sorted by expert."""
    ranks, local = received_RL.shape
    experts_RL = torch.arange(local, device=received_RL.device).expand(ranks, -1)
    ids_Q = experts_RL.reshape(-1).repeat_interleave(received_RL.flatten(), output_size=n_rows)
    return sort_by_expert(ids_Q[:, None], local)


class _ToExperts(torch.autograd.Function):
    """Rows to the ranks of their experts, and into the order of the experts there."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        if route.fp8:
            packed = all_to_all(to_fp8(rows_PD), route.received, route.sent, route.group)
            came_QD = from_fp8(packed, rows_PD.shape[1], rows_PD.dtype)
        else:
            came_QD = all_to_all(rows_PD, route.received, route.sent, route.group)
        return came_QD.index_select(0, route.arrival.order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _send_back(grad_outputs[0], ctx.route), None


class _FromExperts(torch.autograd.Function):
    """The way back: each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _send_back(rows_QD, route)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        came_QD = all_to_all(grad_outputs[0], route.received, route.sent, route.group)
        return came_QD.index_select(0, route.arrival.order), None


def _send_back(rows_QD: Tensor, route: Route) -> Tensor:
    rows_QD = rows_QD.index_select(0, route.arrival.inverse)
    return all_to_all(rows_QD, route.sent, route.received, route.group)


def all_to_all(
    rows: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """The ``received[r]`` rows that each rank r has for this one, which has ``sent[r]`` for it."""
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def to_experts_reference(rows: Sequence[Tensor], counts_RE: Tensor) -> list[Tensor]:
    """The definition in one process: what each rank's experts get of what all ranks send.

    Args:
        rows: of every rank, sorted by expert.
        counts_RE: how many of rank r's rows are for expert e.
    """
    ranks, experts = counts_RE.shape
    pieces = [part.split(counts.tolist()) for part, counts in zip(rows, counts_RE, strict=True)]
    wanted = torch.arange(experts).view(ranks, -1).tolist()
    return [torch.cat([pieces[r][e] for e in mine for r in range(ranks)]) for mine in wanted]


def to_fp8(rows_PD: Tensor) -> Tensor:
    """Rows as bytes: E4M3 numbers, then a float32 scale for every ``TILE`` channels.

    The scale is ``amax / 448`` of the tile (the last may be shorter), at least ``1e-4 / 448``.
    """
    width = rows_PD.shape[1]
    padded = torch.nn.functional.pad(rows_PD.float(), (0, -width % TILE)).unflatten(1, (-1, TILE))
    scales_PT = padded.abs().amax(-1).clamp_min(1e-4) / FP8_MAX
    numbers = (padded / scales_PT[..., None]).flatten(1)[:, :width].to(torch.float8_e4m3fn)
    return torch.cat([numbers.contiguous().view(torch.uint8), scales_PT.view(torch.uint8)], dim=1)


def from_fp8(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Undo :func:`to_fp8` up to its rounding."""
    numbers = packed[:, :width].contiguous().view(torch.float8_e4m3fn).float()
    scales_PT = packed[:, width:].contiguous().view(torch.float32)
    return (numbers * scales_PT.repeat_interleave(TILE, dim=1)[:, :width]).to(dtype)


def ranks_per_token(expert_ids_NK: Tensor, n_experts: int, ranks: int) -> Tensor:
    """How many of ``ranks`` equal parts of the experts each token is sent to, int64 ``[N]``.

    With the number of nodes for ``ranks``: over how many nodes. Node-limited routing
    (``n_limited_groups``) bounds it.
    """
    part_NK = expert_ids_NK // (n_experts // ranks)
    reached = expert_ids_NK.new_zeros(expert_ids_NK.shape[0], ranks).scatter(1, part_NK, 1)
    return reached.sum(1)


class Lane:
    """A second CUDA stream, on which rows travel while the first computes; on the CPU nothing."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.event: torch.cuda.Event | None = None

    def beside(self, *inputs: Tensor) -> AbstractContextManager[object]:
        """Within it, work goes to the lane, after all that ``inputs`` wait for."""
        if not inputs[0].is_cuda:
            return nullcontext()
        if self.stream is None:
            self.stream = torch.cuda.Stream(inputs[0].device)
        if self.event is None:  # later work waits for the mark, not for the other stream
            self.stream.wait_stream(torch.cuda.current_stream())
        for tensor in inputs:
            tensor.record_stream(self.stream)
        return torch.cuda.stream(self.stream)

    def mark(self) -> None:
        """Remember this point of the lane."""
        if self.stream is not None:
            self.event = torch.cuda.Event()
            self.event.record(self.stream)

    def wait_for_mark(self) -> None:
        """Let the host wait until the lane has come to it."""
        if self.event is not None:
            self.event.synchronize()

    def join(self, *outputs: Tensor) -> None:
        """Let the first stream wait for the lane, whose ``outputs`` it will use."""
        if self.stream is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self.stream)
            for tensor in outputs:
                tensor.record_stream(main)
            self.event = None
