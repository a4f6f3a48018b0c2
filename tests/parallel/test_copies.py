"""Copies add up their gradients in the last backward of a step, bucket by bucket, while it runs."""

import pytest
import torch
from torch import distributed as dist
from torch import nn

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.config import ParallelConfig
from fathom.parallel import copies
from fathom.parallel.copies import Copies
from fathom.parallel.mesh import Layout
from ranks import on_ranks


def three_layers() -> nn.ModuleList:
    """Of which the second is large."""
    return nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in ((3, 4), (4, 40), (40, 2)))


def check_sums() -> None:
    layout = Layout(ParallelConfig(dp=2), dist.get_rank())
    torch.manual_seed(0)
    layers, unused = three_layers(), nn.Parameter(torch.zeros(2))
    x = torch.randn(2, 2, 5, 3)  # of two micro-batches, of two ranks
    group, sent, seen = dist.group.WORLD, [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "BUCKET", 100)
        params = [*layers.parameters(), unused]
        Copies(layout, [(param, group) for param in params])
        reduce = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda t, **how: sent.append(len(t)) or reduce(t, **how))
        layers[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(list(sent)))
        for last in (False, True):
            layout.adds_up = last
            nn.Sequential(*layers)(x[int(last), layout.rank]).square().sum().backward()
    assert unused.grad is None
    assert seen == [[], [40]]  # the large one goes before the backward has come to the first layer
    assert sent == [40, 80 + 12]  # the small ones together
    torch.manual_seed(0)
    whole = three_layers()
    nn.Sequential(*whole)(x).square().sum().backward()
    for got, want in zip(layers.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_gradients_of_all_ranks_and_micro_batches_add_up_once():
    said = on_ranks(2, check_sums)
    assert not any(said), "\n".join(said)
