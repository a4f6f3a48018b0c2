"""The same runs and layers on several GPUs, through NCCL (make test-gpu on a machine with them)."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.config import ParallelConfig
from fathom.ffn.dispatch import Dispatcher, LocalDispatcher
from fathom.ffn.experts import Experts
from fathom.ops.registry import wide
from fathom.parallel.ep import ExpertParallel
from fathom.parallel.launch import free_port
from fathom.parallel.mesh import started
from fathom.train.config import RunConfig
from layouts import LAYOUTS, follow

pytestmark = pytest.mark.multi_gpu
ON_GPUS = ["train.device=cuda", "train.save_every=20"]


def rank_of(rank: int, port: int, world: int, work: Callable[..., object], *args: object) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    work(*args)


def on_gpus(world: int, work: Callable[..., object], *args: object) -> None:
    """Run ``work(*args)`` in processes that are forked before CUDA is touched, a GPU for each."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [
        fork.Process(target=rank_of, args=(rank, port, world, work, *args)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world


@pytest.fixture
def train_on_gpus(dataset) -> Callable[[RunConfig, Path], torch.Tensor]:
    """In float64; the losses of each step."""

    def run(cfg: RunConfig, out: Path) -> torch.Tensor:
        on_gpus(cfg.parallel.world, follow, cfg, out, dataset)
        return torch.tensor(json.loads((out / "told.json").read_text()), dtype=torch.float64)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_on_gpus_are_those_of_one(layout, make_config, train_on_gpus, tmp_path):
    cfg = make_config(*ON_GPUS, *LAYOUTS[layout])
    if cfg.parallel.world > torch.cuda.device_count():
        pytest.skip(f"needs {cfg.parallel.world} GPUs")
    want = train_on_gpus(make_config(*ON_GPUS), tmp_path / "alone")
    got = train_on_gpus(cfg, tmp_path / layout)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


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


def test_a_layer_over_two_gpus_is_as_exact_as_on_one_and_fp8_loses_a_few_percent():
    on_gpus(2, check_layer)
