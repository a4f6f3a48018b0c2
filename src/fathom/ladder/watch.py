"""Telling people how a ladder goes: a live table on a terminal, one line per run anywhere else."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fathom.ladder.plan import PlannedArm
from fathom.ladder.study import Study
from fathom.ladder.tables import si
from fathom.ladder.work import TrainTask
from fathom.settings import Data
from fathom.train.progress import duration

TAIL_BYTES = 2**16


class Reporter:
    """Is told what happens, and says nothing: the base of those that do."""

    def plan(
        self, study: Study, planned: Sequence[PlannedArm], seconds: Mapping[str, float]
    ) -> None:
        """What will be trained; ``seconds``: of one run of each arm, estimated."""

    def stage(self, what: str, seconds: float | None) -> None:
        """A part begins; ``seconds``: how long it should take, if that is known."""

    def started(self, task: TrainTask) -> None:
        """A run begins."""

    def finished(self, task: TrainTask, result: Data) -> None:
        """A run's ``result.json``; ``failed`` in it says why there is no loss."""

    def notice(self, sentence: str) -> None:
        """Something a person should know."""

    def results(self, results: Data) -> None:
        """All is done; the content of ``results.json``."""

    def close(self) -> None:
        """All is done, or has stopped."""


class Lines(Reporter):
    """One line per run, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stderr, markup=False, highlight=False)
        self.board = Board()

    def plan(
        self, study: Study, planned: Sequence[PlannedArm], seconds: Mapping[str, float]
    ) -> None:
        self.board.plan(study, planned)
        self.console.print(plan_table(study, planned, seconds))

    def stage(self, what: str, seconds: float | None) -> None:
        self.board.stage(what, seconds)
        self.say(self.board.heading())

    def started(self, task: TrainTask) -> None:
        self.board.started(task)

    def finished(self, task: TrainTask, result: Data) -> None:
        self.board.finished(task, result)
        self.say(self.board.sentence(task, result))

    def notice(self, sentence: str) -> None:
        self.say(sentence)

    def results(self, results: Data) -> None:
        self.console.print(result_table(results))

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


class Screen(Lines):
    """A table that shows what runs, what is done, and what was found so far."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self.draw)

    def stage(self, what: str, seconds: float | None) -> None:
        self.board.stage(what, seconds)
        self.live.start()

    def finished(self, task: TrainTask, result: Data) -> None:
        self.board.finished(task, result)
        if result["failed"]:
            self.say(self.board.sentence(task, result))

    def draw(self) -> Table:
        return self.board.table()

    def results(self, results: Data) -> None:
        self.live.stop()
        super().results(results)

    def close(self) -> None:
        self.live.stop()


def reporter(stream: TextIO | None = None) -> Reporter:
    """The table on a terminal, else the lines."""
    out: TextIO = stream or sys.stderr
    return Screen(out) if out.isatty() else Lines(out)


def plan_table(study: Study, planned: Sequence[PlannedArm], seconds: Mapping[str, float]) -> Table:
    """Arms, sizes, bytes of cache per token, and the cost of one run."""
    title = f"{study.name}: {study.budget.sentence} Seeds {list(study.seeds)}."
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("arm", "parent"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "active", "cache B", "tokens", "FLOPs", "a run"):
        table.add_column(column, justify="right", no_wrap=True)
    for p in planned:
        run = seconds.get(p.arm.name)
        table.add_row(
            p.arm.name,
            p.arm.parent or "",
            si(p.params),
            si(p.active_params),
            f"{p.cache_bytes_per_token:,.0f}",
            si(p.tokens),
            si(p.train_flops),
            duration(run) if run is not None else "?",
        )
    return table


def result_table(results: Data) -> Table:
    """Each arm's loss and what the seeds say of its step; then what needs no training."""
    table = Table(title=f"{results['study']}: held-out bits per byte", box=SIMPLE_HEAD)
    table.add_column("arm", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("verdict")
    for arm in results["arms"]:
        mean, verdict = arm["val_bpb"]["mean"], arm["verdict"]
        said = verdict["sentence"] if verdict else ""
        failed = f"failed: {arm['failed']}"
        table.add_row(arm["name"], *(("", failed) if mean is None else (f"{mean:.4f}", said)))
    for name, anchor in results["anchors"].items():
        table.add_row(name, f"{anchor['mean']:.4f}", "needs no training", style="dim")
    return table


class Board:
    """What is known while the ladder runs: the state behind table and lines."""

    def __init__(self) -> None:
        self.parents: dict[str, str | None] = {}
        self.seeds: tuple[int, ...] = ()
        self.results: dict[tuple[str, int], Data] = {}
        self.running: dict[tuple[str, int], TrainTask] = {}
        self.what = ""
        self.ends: float | None = None

    def plan(self, study: Study, planned: Sequence[PlannedArm]) -> None:
        self.parents = {p.arm.name: p.arm.parent for p in planned}
        self.seeds = study.seeds

    def stage(self, what: str, seconds: float | None) -> None:
        self.what = what
        self.ends = None if seconds is None else time.monotonic() + seconds

    def started(self, task: TrainTask) -> None:
        self.running[task.arm, task.cfg.train.seed] = task

    def finished(self, task: TrainTask, result: Data) -> None:
        key = task.arm, task.cfg.train.seed
        self.running.pop(key, None)
        self.results[key] = result

    def losses(self, arm: str | None) -> dict[int, float]:
        """Finished seeds of an arm."""
        return {
            seed: result["val_bpb"]
            for (name, seed), result in self.results.items()
            if name == arm and seed in self.seeds and not result["failed"]
        }

    def delta(self, arm: str) -> float | None:
        """Mean difference from the parent over the seeds that both have so far."""
        own, parent = self.losses(arm), self.losses(self.parents.get(arm))
        both = own.keys() & parent.keys()
        return fmean(own[seed] - parent[seed] for seed in both) if both else None

    def sentence(self, task: TrainTask, result: Data) -> str:
        """One finished run."""
        run = f"{task.arm} seed {task.cfg.train.seed} lr {task.cfg.train.lr:g}"
        if result["failed"]:
            return f"{run} failed: {result['failed']}"
        judged = task.cfg.train.seed in self.seeds  # a sweep's runs differ in their rates as well
        delta = self.delta(task.arm) if judged else None
        against = (
            "" if delta is None else f" ({delta:+.4f} against {self.parents[task.arm]} so far)"
        )
        return f"{run}: {result['val_bpb']:.4f} bits per byte{against}{self._left()}"

    def heading(self) -> str:
        """What is being done, and for how long."""
        return f"{self.what}{self._left()}"

    def _left(self) -> str:
        return "" if self.ends is None else f"; about {duration(self.ends - time.monotonic())} left"

    def table(self) -> Table:
        """The state of every arm."""
        table = Table(title=self.heading())
        table.add_column("arm")
        for seed in self.seeds:
            table.add_column(f"seed {seed}", justify="right")
        table.add_column("mean", justify="right")
        table.add_column("against parent", justify="right")
        for arm in self.parents:
            losses, delta = self.losses(arm), self.delta(arm)
            table.add_row(
                arm,
                *(self._cell(arm, seed) for seed in self.seeds),
                f"{fmean(losses.values()):.4f}" if losses else "",
                "" if delta is None else f"{delta:+.4f}",
            )
        return table

    def _cell(self, arm: str, seed: int) -> str:
        if (arm, seed) in self.results:
            result = self.results[arm, seed]
            return "failed" if result["failed"] else f"{result['val_bpb']:.4f}"
        task = self.running.get((arm, seed))
        return "" if task is None else f"{share_done(task):.0%}"


def share_done(task: TrainTask) -> float:
    """How far a run in progress is, from the last line of its ``metrics.jsonl``."""
    try:
        lines = _tail(task.folder / "metrics.jsonl").splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        try:
            return json.loads(line)["step"] / task.cfg.train.steps
        except ValueError:  # the line is being written, or cut where the tail begins
            continue
    return 0.0


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace")
