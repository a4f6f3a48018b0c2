"""``fathom chaos``: all of it on one's own machine and filesystem, as a table."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to: it takes a second
from fathom.chaos import ranks, runs
from fathom.chaos.field import Scenario, begin, shortened
from fathom.chaos.saves import Tally, clear, kill_saves, spoil_files
from fathom.config import ParallelConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.tokenizer import Tokenizer
from fathom.layers.base import require
from fathom.model import build_model
from fathom.settings import ConfigError
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
    cfg = shortened(replace(cfg, parallel=ParallelConfig()), steps)
    arena = folder, dataset, seed, only
    yield from _played(runs.SCENARIOS, cfg, *arena)
    try:
        several = ranks.together(cfg)
    except ConfigError as error:
        yield Row(f"{ranks.RANKS} ranks under fire", 0, 0, f"not done: {error}")
    else:
        yield from _played(ranks.SCENARIOS, several, *arena)
    taken = _taken(cfg, dataset.tokenizer)
    for about, name, times, do in (
        ("a process killed while it saves without pause", "saves", kills, kill_saves),
        ("a bit flipped, or a file cut", "damage", flips, spoil_files),
    ):
        if only in (None, name) and times:
            yield _row(about, do(clear(folder / name), taken, times, seed))


def _played(
    scenarios: Sequence[Scenario],
    cfg: RunConfig,
    folder: Path,
    dataset: Dataset,
    seed: int,
    only: str | None,
) -> Iterator[Row]:
    """A row for each scenario that is wanted; the run to which none happens is trained first."""
    wanted = [scenario for scenario in scenarios if only in (None, scenario.__name__)]
    if not wanted:
        return
    field = begin(cfg, folder / f"of-{cfg.parallel.world}", dataset, seed)
    for scenario in wanted:
        problem = scenario(field, field.folder / scenario.__name__)
        about = str(scenario.__doc__).splitlines()[0].rstrip(".")
        skipped = (problem or "").startswith("not done")
        yield Row(about, int(not skipped), int(problem is None), problem or "")


def _row(about: str, tally: Tally) -> Row:
    failed = len(tally.failures)
    return Row(about, tally.tries, tally.tries - failed, (tally.failures or [""])[0])


def _taken(cfg: RunConfig, tokenizer: Tokenizer) -> Snapshot:
    model = build_model(cfg.model, seed=cfg.train.seed)
    parts = Parts(model, Optimizer(model, cfg.train), SpikeGuard(0.0, torch.device("cpu")))
    return snapshot(cfg, parts, tokenizer)
