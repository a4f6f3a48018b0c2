"""Where the scenarios of ``runs.py`` and ``ranks.py`` take place, and how their ends are judged."""

import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from fathom.chaos.children import Child, placed
from fathom.chaos.saves import clear
from fathom.convert.run_folder import committed, step_of
from fathom.data.dataset import Dataset
from fathom.parallel.launch import free_port
from fathom.train.config import RunConfig
from fathom.train.loop import train
from fathom.train.metrics import read_lines

TIMINGS = ("tokens_per_second", "memory_bytes", "mfu")


@dataclass(frozen=True)
class Field:
    """A short run, and one of the same that nothing happened to.

    Args:
        cfg: the run, shortened.
        folder: its runs are made in here, each in an own folder.
        dataset: opened already.
        whole: the folder of the run that nothing happens to.
        seconds: what that took.
        draw: decides the moments.
    """

    cfg: RunConfig
    folder: Path
    dataset: Dataset
    whole: Path
    seconds: float
    draw: random.Random

    def moment(self) -> float:
        """Seconds from the start of a run, within it."""
        return self.draw.uniform(0, self.seconds)

    def work(self, run: Path, cfg: RunConfig | None = None) -> Callable[[], int]:
        """What a process does that trains in ``run``."""
        return lambda: train(cfg or self.cfg, run, dataset=self.dataset).exit_code

    def start(self, run: Path, cfg: RunConfig | None = None) -> Child:
        """A process that trains in ``run``, alone."""
        return Child(self.work(run, cfg), log=self.log(run))

    def start_ranks(self, run: Path, cfg: RunConfig | None = None) -> list[Child]:
        """All processes of the run, as ``torchrun`` would start them."""
        size = (cfg or self.cfg).parallel.world
        if size == 1:
            return [self.start(run, cfg)]
        port, work, log = free_port(), self.work(run, cfg), self.log(run)
        return [Child(placed(work, rank, size, port), log=log) for rank in range(size)]

    def log(self, run: Path) -> Path:
        """What the processes of a run have said."""
        return run.with_suffix(".log")

    def said(self, run: Path) -> str:
        return self.log(run).read_text() if self.log(run).exists() else ""

    def ended(self, run: Path, code: int) -> str:
        """A sentence about an exit code that should not be."""
        return f"exit code {code}: {self.said(run).strip()[-200:]}"

    def finish(self, run: Path) -> str | None:
        """Train to the end; what is wrong then, or None."""
        codes = [child.wait() for child in self.start_ranks(run)]
        if any(codes):
            return f"it did not go on: {self.ended(run, max(codes, key=abs))}"
        return difference(run, self.whole)

    def half(self, run: Path) -> None:
        """Train until two checkpoints are there, and one step of a third is done at most."""
        steps = 5

        def work() -> int:
            done = iter(range(1, steps + 1))
            stop = lambda: next(done) == steps  # noqa: E731
            return train(self.cfg, run, dataset=self.dataset, should_stop=stop).exit_code

        code = Child(work, log=self.log(run)).wait()
        assert code == 75, self.said(run)
        assert [step_of(folder) for folder in committed(run)] == [4, 5]


Scenario = Callable[[Field, Path], str | None]  # in an own folder; what went wrong, or None


def shortened(cfg: RunConfig, steps: int) -> RunConfig:
    """A run of so many steps that saves every other one, and does nothing else."""
    quick = {"warmup_steps": min(cfg.train.warmup_steps, steps), "save_every": 2, "eval_every": 0}
    quick |= {"sample_every": 0, "steps": steps, "compile": False, "keep_every": 0}
    return replace(cfg, train=replace(cfg.train, **quick))


def begin(cfg: RunConfig, folder: Path, dataset: Dataset, seed: int) -> Field:
    """Train the run that nothing happens to.

    Raises:
        RuntimeError: that does not work even so.
    """
    field = Field(cfg, clear(folder), dataset, folder / "whole", 0.0, random.Random(seed))
    begun = time.monotonic()
    codes = [child.wait() for child in field.start_ranks(field.whole)]
    if any(codes):
        raise RuntimeError(f"the run fails without any harm: {field.said(field.whole).strip()}")
    return replace(field, seconds=time.monotonic() - begun)


def difference(run: Path, whole: Path, ignoring: Collection[str] = ()) -> str | None:
    """The first way in which two finished runs differ, timings apart; None: in none.

    Args:
        ignoring: files of a checkpoint that may differ.
    """
    ours, theirs = (
        [
            {key: value for key, value in line.items() if key not in TIMINGS}
            for line in read_lines(folder / "metrics.jsonl")
        ]
        for folder in (run, whole)
    )
    if ours != theirs:
        return "its records are not those of the run that nothing happened to"
    ends = [committed(folder)[-1] for folder in (run, whole)]
    for path in sorted(ends[0].iterdir()):
        if path.name not in ignoring and path.read_bytes() != (ends[1] / path.name).read_bytes():
            return f"{path.name} is not that of the run that nothing happened to"
    return None


def appears(path: Path, seconds: float = 60) -> None:
    """Wait until a file is there, at most so long."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.002)
