"""Experts on several ranks: tokens travel to them and back by all-to-all.

As DeepSeek-V3 trains (arXiv:2412.19437, section 3.2): rank r of R holds experts ``r E/R`` to
``(r+1) E/R - 1``, every rank has its own tokens, and none is dropped, however many an expert gets.
As in DeepEP a token goes to a rank once, however many of its experts are there: with it go its
gates and choices, and the rank sends back one sum. So a token is routed twice by the same means,
to ranks and there to experts, and what a rank does with what came is the whole layer of one
process. Counts are exchanged once per layer and forward and read by the host, which must know how
much to receive; the way back and the backward reuse them. While they travel the shared experts
compute.

Shapes: N tokens of this rank, K chosen, D model dim, R ranks, M rows that leave, one for each token
and rank, C rows that come, E experts, L = E / R of them here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.ffn.experts import Experts
from fathom.ops.experts import row_passes
from fathom.ops.permute import Permutation, sort_by_expert, without_last
from fathom.ops.registry import autocast

Args = ParamSpec("Args")
Result = TypeVar("Result")

TILE = 128  # channels that share an FP8 scale, as in DeepSeek-V3, section 3.3.2
FP8_MAX = 448.0


def eager(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Left out of compiled graphs, as it is and with all that it calls."""
    return cast(Callable[Args, Result], torch.compiler.disable(function))


class Route(NamedTuple):
    """Who sends how many rows to whom.

    Args:
        leaving: of the pairs (token, rank), those whose token has an expert there, by rank.
        sent, received: rows to and from each rank.
        group: the ranks.
        fp8: whether tokens travel to experts as FP8.
    """

    leaving: Permutation
    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup
    fp8: bool


class Arrived(NamedTuple):
    """What came from all ranks, for the experts here.

    Args:
        x_CD, gates_CK: tokens and their gates, by sending rank.
        choices: those of their choices that are here, by expert.
        route: the way back.
    """

    x_CD: Tensor
    gates_CK: Tensor
    choices: Permutation
    route: Route


class ExpertParallel:
    """The dispatcher of an MoE whose experts are spread over ``group``.

    Args:
        n_experts: E, of all ranks.
        group: the ranks, neighbours on a node.
        fp8: whether tokens travel to experts as FP8.
        nodes: over how many nodes the ranks are spread.
    """

    def __init__(
        self, n_experts: int, group: dist.ProcessGroup, *, fp8: bool = False, nodes: int = 1
    ) -> None:
        self.n_experts, self.group, self.fp8, self.nodes = n_experts, group, fp8, nodes
        self.local = n_experts // group.size()
        self.lane = Lane()

    @eager
    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor) -> "Travelling":
        """Exchange how many rows go to each rank; they follow when the host has the counts."""
        (x_ND,) = autocast(x_ND)  # as experts will
        ranks = self.group.size()
        counts_E = sort_by_expert(expert_ids_NK, self.n_experts).counts
        here_NR = reached(expert_ids_NK, self.n_experts, ranks)
        leaving = self.by_rank(here_NR)
        pairs_R = counts_E.view(ranks, -1).sum(1)
        sent_R2 = torch.stack([leaving.counts[:ranks], pairs_R], dim=1)
        with self.lane.beside(sent_R2):
            received_R2 = torch.empty_like(sent_R2)  # of the lane's memory: nobody else keeps it
            dist.all_to_all_single(received_R2, sent_R2, group=self.group)
            on_host = torch.stack([sent_R2, received_R2]).to("cpu", non_blocking=True)
            self.lane.mark()
        nodes_N = here_NR.unflatten(1, (self.nodes, -1)).any(-1).sum(1)
        reach = torch.stack([here_NR.sum(1), nodes_N]).sum(1) / max(len(x_ND), 1)
        return Travelling(self, x_ND, expert_ids_NK, counts_E, reach, leaving, on_host)

    def by_rank(self, here_NR: Tensor) -> Permutation:
        """Pairs (token, rank) sorted by rank, those without an expert there at the end."""
        ranks = self.group.size()
        each_R = torch.arange(ranks, device=here_NR.device)
        return sort_by_expert(torch.where(here_NR, each_R, ranks), ranks + 1)

    def arrange(self, ids_CK: Tensor, n_pairs: int) -> Permutation:
        """The choices of what came by expert; ``n_pairs`` of them are here."""
        mine_CK = ids_CK - self.group.rank() * self.local
        here_CK = (mine_CK >= 0) & (mine_CK < self.local)
        choices = sort_by_expert(torch.where(here_CK, mine_CK, self.local), self.local + 1)
        return without_last(choices, n_pairs)


class Travelling(NamedTuple):
    """Tokens whose counts are on their way to the host."""

    by: ExpertParallel
    x_ND: Tensor
    expert_ids_NK: Tensor
    counts_E: Tensor
    reach: Tensor
    leaving: Permutation
    on_host: Tensor

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 ``[E]``, of the tokens that left here."""
        return self.counts_E

    @eager
    def through(self, experts: Experts, gates_NK: Tensor) -> Tensor:
        """Each token through its experts, wherever they are, weighted and summed: ``[N, D]``."""
        came = self.arrived(gates_NK)
        sums_CD = experts(came.x_CD, came.gates_CK, came.choices)
        return _FromExperts.apply(sums_CD, came.route)

    def arrived(self, gates_NK: Tensor) -> Arrived:
        """Send the tokens, and take in those for the experts here."""
        by, lane = self.by, self.by.lane
        lane.wait_for_mark()
        (sent, _), (received, pairs) = self.on_host.mT.tolist()
        route = Route(without_last(self.leaving, sum(sent)), sent, received, by.group, by.fp8)
        with lane.beside(self.x_ND, gates_NK, self.expert_ids_NK, *self.leaving):
            x_CD, gates_CK, ids_CK = _ToExperts.apply(
                self.x_ND, gates_NK, self.expert_ids_NK, route
            )
            choices = by.arrange(ids_CK, sum(pairs))
        lane.join(x_CD, gates_CK, *choices)
        return Arrived(x_CD, gates_CK, choices, route)


class _ToExperts(torch.autograd.Function):
    """Tokens, gates and choices to the ranks of the experts: ``[C, D]``, ``[C, K]`` twice."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, ids_NK: Tensor, route: Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route = route
        rows_MD = leave(x_ND, route)
        if route.fp8:
            packed = there(to_fp8(rows_MD), route)
            x_CD = from_fp8(packed, x_ND.shape[1], x_ND.dtype)
        else:
            x_CD = there(rows_MD, route)
        chosen_NJ = torch.cat([gates_NK, ids_NK.to(gates_NK.dtype)], dim=1)  # J = 2 K
        gates_CK, ids_CK = there(leave(chosen_NJ, route), route).chunk(2, dim=1)
        ids_CK = ids_CK.long()
        ctx.mark_non_differentiable(ids_CK)
        return x_CD, gates_CK.contiguous(), ids_CK

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_CD, dgates_CK, _ = grad_outputs
        dx_ND = come_home(back(dx_CD, ctx.route), ctx.route)
        return dx_ND, come_home(back(dgates_CK, ctx.route), ctx.route), None, None


class _FromExperts(torch.autograd.Function):
    """The sums of each rank back to the ranks of the tokens, and added up there: ``[N, D]``."""

    @staticmethod
    def forward(ctx: Any, sums_CD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return come_home(back(sums_CD, route), route)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return there(leave(grad_outputs[0], ctx.route), ctx.route), None


def leave(x_ND: Tensor, route: Route) -> Tensor:
    """A row for each rank that a token goes to: ``[M, D]``."""
    order_M, inverse_P, *_ = route.leaving
    return row_passes(x_ND).gather_rows(x_ND, order_M, inverse_P, route.group.size())


def come_home(rows_MD: Tensor, route: Route) -> Tensor:
    """The sum of a token's rows: ``[N, D]``."""
    rows_NR = route.leaving.inverse.view(-1, route.group.size())
    return row_passes(rows_MD).gather_sum(rows_MD, rows_NR)


def there(rows_MD: Tensor, route: Route) -> Tensor:
    """Rows to the ranks for which they are: ``[C, D]``."""
    return all_to_all(rows_MD, route.received, route.sent, route.group)


def back(rows_CD: Tensor, route: Route) -> Tensor:
    """Rows to the ranks from which they came: ``[M, D]``."""
    return all_to_all(rows_CD, route.sent, route.received, route.group)


def all_to_all(
    rows: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """The ``received[r]`` rows that each rank r has for this one, which has ``sent[r]`` for it."""
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def to_ranks_reference(
    x: Sequence[Tensor], expert_ids: Sequence[Tensor], n_experts: int
) -> list[Tensor]:
    """The definition in one process: the tokens that each rank gets of all ranks' tokens.

    Args:
        x: of every rank, ``[N, D]``.
        expert_ids: of every rank, ``[N, K]``.
        n_experts: E.
    """
    ranks = len(x)
    reached = [ids // (n_experts // ranks) for ids in expert_ids]
    return [
        torch.cat([x_ND[(to_NK == rank).any(1)] for x_ND, to_NK in zip(x, reached, strict=True)])
        for rank in range(ranks)
    ]


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


def reached(expert_ids_NK: Tensor, n_experts: int, parts: int) -> Tensor:
    """In which of ``parts`` equal parts of the experts each token has some, bool ``[N, parts]``.

    Node-limited routing (``n_limited_groups``) bounds how many they are.
    """
    part_NK = expert_ids_NK // (n_experts // parts)
    return (part_NK[..., None] == torch.arange(parts, device=part_NK.device)).any(1)


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
