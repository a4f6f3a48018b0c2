"""``fathom chaos``: all of it on one's own machine and filesystem, as a table."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fathom.chaos.runs import SCENARIOS, begin, shortened
from fathom.chaos.saves import Tally, clear, kill_saves, spoil_files
from fathom.data.dataset import open_dataset
from fathom.data.tokenizer import Tokenizer
from fathom.layers.base import require
from fathom.model import build_model
from fathom.train.checkpoint import Parts, Snapshot, snapshot
from fathom.train.config import RunConfig
from fathom.train.guards import SpikeGuard
from fathom.train.loop import check_vocabulary
from fathom.train.optim import Optimizer


@dataclass(frozen=True)
class Row:
    """What was done, how often, and how often it was survived; else a sentence."""

    what: str
    tries: int
    survived: int
    note: str = ""


def chaos(
    cfg: RunConfig,
    folder: Path,
    *,
    steps: int = 12,
    kills: int = 100,
    flips: int = 200,
    seed: int = 0,
    only: str | None = None,
) -> Iterator[Row]:
    """Do to short runs of ``cfg`` what may happen to a run, and tell what was survived.

    Everything takes place in ``folder``, on the filesystem that it is on, and in forked processes
    with one thread each: call it in a process that has computed nothing with torch yet.

    Args:
        steps: of each run.
        kills: of a process that only saves.
        flips: damaged files.
        only: the scenario of this name alone.
    """
    require(hasattr(os, "fork"), "fathom chaos needs a system that can fork: Linux or macOS")
    require(steps >= 6, f"--steps must be at least 6, got {steps}: two checkpoints and a third")
    torch.set_num_threads(1)
    dataset = open_dataset(cfg.data)
    check_vocabulary(cfg, dataset)
    cfg = shortened(cfg, steps)
    field = begin(cfg, folder / "runs", dataset, seed)
    for scenario in SCENARIOS:
        if only in (None, scenario.__name__):
            problem = scenario(field, field.folder / scenario.__name__)
            about = str(scenario.__doc__).splitlines()[0].rstrip(".")
            skipped = (problem or "").startswith("not done")
            yield Row(about, int(not skipped), int(problem is None), problem or "")
    taken = _taken(cfg, dataset.tokenizer)
    for about, name, times, do in (
        ("a process killed while it saves without pause", "saves", kills, kill_saves),
        ("a bit flipped, or a file cut", "damage", flips, spoil_files),
    ):
        if only in (None, name) and times:
            yield _row(about, do(clear(folder / name), taken, times, seed))


def _row(about: str, tally: Tally) -> Row:
    failed = len(tally.failures)
    return Row(about, tally.tries, tally.tries - failed, (tally.failures or [""])[0])


def _taken(cfg: RunConfig, tokenizer: Tokenizer) -> Snapshot:
    model = build_model(cfg.model, seed=cfg.train.seed)
    parts = Parts(model, Optimizer(model, cfg.train), SpikeGuard(0.0, torch.device("cpu")))
    return snapshot(cfg, parts, tokenizer)
