"""Layouts to try, and a training that tells every step's losses in full."""

import json
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from fathom.data.dataset import Dataset
from fathom.parallel import build
from fathom.train import loop, step
from fathom.train.config import RunConfig

LAYOUTS = {
    "dp2": ["parallel.dp=2"],
    "fsdp2": ["parallel.dp=2", "parallel.shard=2"],
    "ep2": ["parallel.ep=2"],
    "ep2-shard2": ["parallel.ep=2", "parallel.shard=2"],
    "dp2-ep2": ["parallel.dp=2", "parallel.ep=2"],
    "fsdp2-ep2": ["parallel.dp=2", "parallel.ep=2", "parallel.shard=4"],
    "hybrid": ["parallel.dp=4", "parallel.shard=2"],
    "fsdp2-ep4": ["parallel.dp=2", "parallel.ep=4", "parallel.shard=8"],
    "hybrid-ep2": ["parallel.dp=4", "parallel.ep=2", "parallel.shard=4"],
}


def float64(cfg, layout, *, dtype, **rest):
    return build(cfg, layout, dtype=torch.float64, **rest)


def follow(cfg: RunConfig, out: Path, dataset: Dataset, stop_at: int | None = None) -> None:
    """Train in float64; rank 0 writes the losses of each step in full to ``told.json``."""
    steps: list[list[float]] = []

    class Told(step.Learner):
        def step(self) -> step.Done:
            done = super().step()
            values = [*done.sums.losses.values(), done.verdict["grad_norm"]]
            steps.append([float(value) for value in values])
            return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Learner", Told)
        patch.setattr(step, "build", float64)
        calls = iter(range(1, 10**6))
        loop.train(cfg, out, dataset=dataset, should_stop=lambda: next(calls) == stop_at)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (out / "told.json").write_text(json.dumps(steps))
