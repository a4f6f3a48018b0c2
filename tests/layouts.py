"""Layouts to try, and a training that tells every step's losses in full."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.data.dataset import Dataset
from fathom.parallel import build
from fathom.train import loop
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
