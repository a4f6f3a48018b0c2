"""Every layout trains as one process does: losses, gradients, initial and held-out values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.data.dataset import Dataset
from fathom.parallel import build
from fathom.train import loop
from fathom.train.config import RunConfig
from ranks import on_ranks

LAYOUTS = {
    "dp2": ["parallel.dp=2"],
    "fsdp2": ["parallel.dp=2", "parallel.shard=2"],
    "ep2": ["parallel.ep=2"],
    "ep2-shard2": ["parallel.ep=2", "parallel.shard=2"],
    "dp2-ep2": ["parallel.dp=2", "parallel.ep=2"],
    "fsdp2-ep2": ["parallel.dp=2", "parallel.ep=2", "parallel.shard=4"],
    "hybrid": ["parallel.dp=4", "parallel.shard=2"],
}
FAST = ("ep2", "fsdp2-ep2")


class Told(loop.Trainer):
    """Trains in float64 and keeps the losses of each step in full."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.steps: list[list[float]] = []

    def record(self, bits, lr, sums, guard) -> None:
        values = [*sums.losses.values(), guard["grad_norm"]]
        self.steps.append([float(value) for value in values])
        super().record(bits, lr, sums, guard)

    def result(self, reason):
        (self.out / "told.json").write_text(json.dumps(self.steps)) if self.layout.leads else None
        return super().result(reason)


def float64(cfg, layout, *, dtype, **rest):
    return build(cfg, layout, dtype=torch.float64, **rest)


def follow(cfg: RunConfig, out: Path, dataset: Dataset, stop_at: int | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", Told)
        patch.setattr(loop, "build", float64)
        calls = iter(range(1, 10**6))
        loop.train(cfg, out, dataset=dataset, should_stop=lambda: next(calls) == stop_at)


@pytest.fixture
def train64(run_dir, dataset) -> Callable[..., torch.Tensor]:
    """``train64(cfg)``: in as many processes as it asks for; the losses of each step."""

    def run(cfg: RunConfig, stop_at: int | None = None, out: Path = run_dir) -> torch.Tensor:
        if cfg.parallel.world == 1:
            follow(cfg, out, dataset, stop_at)
        else:
            said = on_ranks(cfg.parallel.world, follow, cfg, out, dataset, stop_at)
            assert not any(said), "\n".join(said)
        return torch.tensor(json.loads((out / "told.json").read_text()), dtype=torch.float64)

    return run


@pytest.fixture
def alone(make_config, train64, tmp_path_factory) -> torch.Tensor:
    """The losses of one process."""
    folder = tmp_path_factory.getbasetemp() / "alone"
    if not (folder / "told.json").exists():
        train64(make_config(), out=folder)
    return torch.tensor(json.loads((folder / "told.json").read_text()), dtype=torch.float64)


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS]
)
def test_twenty_steps_in_float64_are_those_of_one_process(layout, alone, make_config, train64):
    got = train64(make_config(*LAYOUTS[layout]))
    torch.testing.assert_close(got, alone, rtol=1e-10, atol=0)
