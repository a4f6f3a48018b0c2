"""Several GPUs for a test: a process for each, and what these are asked to do.

They are spawned, for a process in which CUDA was asked for anything cannot be forked; so what they
run must stand in a module that they can import.
"""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fathom.config import ParallelConfig
from fathom.data.dataset import Dataset
from fathom.ffn.dispatch import Dispatcher, LocalDispatcher
from fathom.ffn.experts import Experts
from fathom.ops.registry import wide
from fathom.parallel.ep import ExpertParallel
from fathom.parallel.launch import free_port
from fathom.parallel.mesh import started
from fathom.train.config import RunConfig
from layouts import follow


def rank_of(rank: int, port: int, world: int, work: Callable[..., object], *args: object) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    work(*args)


def on_gpus(world: int, work: Callable[..., object], *args: object) -> None:
    """Run ``work(*args)`` in processes of their own, a GPU for each."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [
        spawn.Process(target=rank_of, args=(rank, port, world, work, *args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world


def follow_in(cfg: RunConfig, out: Path, data: Path) -> None:
    """Train on the dataset of a folder, and write what was told."""
    follow(cfg, out, Dataset(data))


def check_layer() -> None:
    """This rank's part of a layer in bfloat16 against all of it in float64; then through FP8."""
    n, dim, inner, n_experts, top_k = 1000, 256, 128, 8, 3
    with started(ParallelConfig(ep=2), "cuda") as layout:
        torch.manual_seed(0)
        experts = Experts(n_experts, dim, inner).cuda()
        for weight in experts.parameters():
            weight.data.normal_(std=0.1)
        x, slope = torch.randn(2, 2 * n, dim, device="cuda")
        gates, ids = torch.rand(2 * n, n_experts, device="cuda").topk(top_k)
        ids[:n] = ids[:n] % 3  # the first rank's tokens stay there, some twice at one expert
        mine = slice(n * layout.rank, n * (layout.rank + 1))
        part = Experts(n_experts // 2, dim, inner).cuda().bfloat16()
        held = slice(n_experts // 2 * layout.rank, n_experts // 2 * (layout.rank + 1))
        for ours, whole in zip(part.parameters(), experts.parameters(), strict=True):
            ours.data.copy_(whole.data[held])
            whole.data.copy_(whole.data.bfloat16())
        x, slope = x.bfloat16(), slope.bfloat16()

        def run(how: Dispatcher, layer: Experts, rows: slice, dtype: torch.dtype) -> list[Tensor]:
            inputs = [x[rows].to(dtype), gates[rows].to(wide(dtype))]
            leaves = [*(t.clone().requires_grad_() for t in inputs), *layer.parameters()]
            out = how.dispatch(leaves[0], ids[rows]).through(layer, leaves[1])
            return [out, *torch.autograd.grad(out, leaves, slope[rows].to(dtype))]

        alone = LocalDispatcher(n_experts)
        everything = slice(0, 2 * n)
        exact = run(alone, experts.double(), everything, torch.float64)
        plain = run(alone, experts.bfloat16(), everything, torch.bfloat16)
        group = layout.ep_group
        got = run(ExpertParallel(n_experts, group), part, mine, torch.bfloat16)
        cut = [mine] * 3 + [held] * 2
        for ours, one, want, of in zip(got, plain, exact, cut, strict=True):
            error, error_of_one = ((t.double() - want[of]).norm() for t in (ours, one[of]))
            assert error <= 2 * error_of_one + 1e-6 * want[of].norm()
        [rounded, *_] = run(ExpertParallel(n_experts, group, fp8=True), part, mine, torch.bfloat16)
        error = (rounded.double() - exact[0][mine]).norm() / exact[0][mine].norm()
        assert 0.01 < error < 0.06, error
