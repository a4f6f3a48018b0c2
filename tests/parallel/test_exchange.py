"""Tokens reach experts on other ranks and come back, whatever the counts: values, gradients."""

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor
from torch import distributed as dist
from torch.testing import assert_close

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.ffn.dispatch import LocalDispatcher
from fathom.ffn.experts import Experts
from fathom.parallel.ep import (
    ExpertParallel,
    from_fp8,
    reached,
    to_fp8,
    to_ranks_reference,
)
from fathom.sizing.parallel import exchange_bytes
from ranks import on_ranks

DIM, INNER = 5, 3
# every rank must try the same cases in the same order, so nothing is shrunk or remembered
SAME = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)


class World(NamedTuple):
    """The tokens of all ranks, their choices, and all experts."""

    x: list[Tensor]
    ids: list[Tensor]
    gates: list[Tensor]
    experts: Experts


@st.composite
def worlds(draw: st.DrawFn, ranks: int) -> World:
    local, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_experts = ranks * local
    wanted = draw(st.sampled_from(["any", "one expert", "one rank", "none here"]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(st.integers(0, 7)) for _ in range(ranks)]
    ids = [torch.randint(n_experts, (n, top_k), generator=g) for n in sizes]
    if wanted == "one expert":
        ids = [torch.full_like(i, n_experts - 1) for i in ids]
    elif wanted == "one rank":
        ids = [i % local for i in ids]
    elif wanted == "none here":
        ids = [(rank * local + i % local) % n_experts for rank, i in enumerate(ids)]
    x = [torch.randn(n, DIM, generator=g, dtype=torch.float64) for n in sizes]
    gates = [torch.rand(n, top_k, generator=g, dtype=torch.float64) for n in sizes]
    experts = Experts(n_experts, DIM, INNER).double()
    for weight in experts.parameters():
        weight.data.normal_(generator=g)
    return World(x, ids, gates, experts)


def layer(dispatcher, experts, x, ids, gates) -> Tensor:
    return dispatcher.dispatch(x, ids).through(experts, gates)


def check_world(world: World) -> None:
    """This rank's part of the layer against all of it in one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    n_experts = len(world.experts.w_down)
    for tensor in (*world.x, *world.gates):
        tensor.requires_grad_()
    whole = (torch.cat(part) for part in world[:3])
    want = layer(LocalDispatcher(n_experts), world.experts, *whole)
    (want * torch.arange(want.numel()).view_as(want).cos()).sum().backward()
    slope = torch.arange(want.numel()).view_as(want).cos().split([len(x) for x in world.x])[rank]

    mine = slice(rank * n_experts // ranks, (rank + 1) * n_experts // ranks)
    part = Experts(n_experts // ranks, DIM, INNER).double()
    for ours, theirs in zip(part.parameters(), world.experts.parameters(), strict=True):
        ours.data.copy_(theirs.data[mine])
    x, gates = (t[rank].detach().clone().requires_grad_() for t in (world.x, world.gates))
    got = layer(ExpertParallel(n_experts, dist.group.WORLD), part, x, world.ids[rank], gates)
    (got * slope).sum().backward()
    assert_close(got, want.split([len(x) for x in world.x])[rank], rtol=1e-12, atol=1e-12)
    for ours, theirs in ((x, world.x[rank]), (gates, world.gates[rank])):
        assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(part.parameters(), world.experts.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad[mine], rtol=1e-12, atol=1e-12)


def check_arrivals(world: World) -> None:
    """What comes to the experts here against the definition."""
    rank, n_experts = dist.get_rank(), len(world.experts.w_down)
    want = to_ranks_reference(world.x, world.ids, n_experts)[rank]
    one = ExpertParallel(n_experts, dist.group.WORLD)
    sending = one.dispatch(world.x[rank], world.ids[rank])
    came = sending.arrived(world.gates[rank])
    assert torch.equal(came.x_CD, want)
    chosen = torch.cat([ids.flatten() for ids in world.ids])
    counts = [(chosen == expert).sum().item() for expert in range(n_experts)]
    assert came.choices.counts.tolist() == counts[rank * one.local : (rank + 1) * one.local]
    mine = [(world.ids[rank] == expert).sum().item() for expert in range(n_experts)]
    assert sending.tokens_per_expert.tolist() == mine


def check_all() -> None:
    ranks = dist.get_world_size()
    SAME(given(worlds(ranks))(check_world))()
    SAME(given(worlds(ranks))(check_arrivals))()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_layer_over_ranks_is_the_layer_of_one_process(ranks):
    said = on_ranks(ranks, check_all)
    assert not any(said), "\n".join(said)


class Counter:
    """Bytes that leave this rank by all-to-all."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes, self._exchange = 0, dist.all_to_all_single
        patch.setattr(dist, "all_to_all_single", self)

    def __call__(self, out, rows, received=None, sent=None, group=None):
        rank = dist.get_rank(group)
        stays = len(rows) // dist.get_world_size(group) if sent is None else sent[rank]
        self.bytes += (len(rows) - stays) * rows[:1].nbytes if len(rows) else 0
        return self._exchange(out, rows, received, sent, group=group)


def check_bytes(fp8: bool, dtype: torch.dtype) -> None:
    n_tokens, top_k, n_experts, dim = 12, 2, 8, 130
    ranks = dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        x = torch.randn(n_tokens, dim, dtype=dtype, requires_grad=True)
        ids = torch.rand(n_tokens, n_experts).topk(top_k).indices
        one = ExpertParallel(n_experts, dist.group.WORLD, fp8=fp8)
        experts = Experts(n_experts // ranks, dim, 4).to(dtype)
        for weight in experts.parameters():
            weight.data.zero_()
        one.dispatch(x, ids).through(experts, torch.ones(ids.shape)).sum().backward()
    here_NR = reached(ids, n_experts, ranks)
    away = here_NR.sum() - here_NR[:, dist.get_rank()].sum()
    both = torch.stack([torch.tensor(counter.bytes), away])  # what one sends the other answers
    dist.all_reduce(both)
    sent, rows = both.tolist()
    counts = 16 * ranks * (ranks - 1)
    assert sent == exchange_bytes(dim, top_k, rows, dtype.itemsize, fp8=fp8) + counts


@pytest.mark.parametrize("fp8", [False, True], ids=["as-they-are", "fp8"])
def test_bytes_on_the_wire_are_those_of_the_calculator(fp8):
    said = on_ranks(2, check_bytes, fp8, torch.float32)
    assert not any(said), "\n".join(said)


def test_fp8_rows_come_back_within_half_a_step_of_their_largest():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 200, generator=g) * torch.logspace(-6, 6, 9)[:, None]
    rows[3] = 0
    back = from_fp8(to_fp8(rows), 200, torch.float32)
    for tile in (slice(0, 128), slice(128, 200)):
        largest = rows[:, tile].abs().amax(1, keepdim=True).clamp_min(1e-4)
        # E4M3: a relative 2^-4 at most, and a subnormal step of 2^-9 of the scale below that
        bound = (rows[:, tile].abs() / 16).maximum(largest / 448 * 2**-10)
        assert ((back - rows)[:, tile].abs() <= bound * 1.0001).all()
    assert torch.equal(back[3], rows[3])


def test_node_limited_routing_bounds_the_ranks_of_a_token():
    ids = torch.tensor([[0, 1, 2], [0, 4, 7], [6, 7, 6]])
    assert reached(ids, n_experts=8, parts=4).sum(1).tolist() == [2, 3, 1]
    assert reached(ids, n_experts=8, parts=2).sum(1).tolist() == [1, 2, 1]


def check_reach() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 4, 7], [6, 7, 6]])
    for nodes, want in ((1, 1.0), (2, 4 / 3), (4, 2.0)):
        sending = ExpertParallel(8, dist.group.WORLD, nodes=nodes).dispatch(torch.ones(3, 2), ids)
        torch.testing.assert_close(sending.reach, torch.tensor([2.0, want]))


def test_ranks_and_nodes_of_a_token_are_counted():
    said = on_ranks(4, check_reach)
    assert not any(said), "\n".join(said)
