"""Where a ladder keeps things, and how runs of an earlier form of its study are kept apart.

::

    study.toml                    the study as it was run, with the seeds that were added
    runs/ARM/seed-N/              a run folder; result.json once it is trained and measured
    runs/ARM/*.json               the arm's estimate, probes and speed
    sweep/ARM/lr-RATE/            the runs of a learning-rate sweep
    anchors.json                  what needs no training
    replaced/                     runs that an earlier form of the study left
    results.json, report.html
"""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fathom.ladder.plan import config_hash
from fathom.ladder.task import read_object
from fathom.ladder.work import TrainTask
from fathom.settings import ConfigError, parse, read_toml
from fathom.train.config import RunConfig


@dataclass(frozen=True)
class Folder:
    """A ladder's folder; it need not exist yet."""

    root: Path

    @property
    def study(self) -> Path:
        return self.root / "study.toml"

    @property
    def anchors(self) -> Path:
        return self.root / "anchors.json"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    def run(self, arm: str, seed: int) -> Path:
        return self.root / "runs" / arm / f"seed-{seed}"

    def sweep(self, arm: str, lr: float) -> Path:
        return self.root / "sweep" / arm / f"lr-{lr:g}"

    def of_arm(self, arm: str, name: str) -> Path:
        """A file about an arm as a whole."""
        return self.root / "runs" / arm / f"{name}.json"

    def recorded_seeds(self) -> Sequence[int]:
        """The seeds this folder was last run with."""
        return read_toml(self.study)["seeds"] if self.study.is_file() else ()

    def set_aside(self, task: TrainTask, fingerprint: str) -> str | None:
        """Move a run of another config out of the way of ``task``; the sentence that says so.

        A run that only stopped half-way stays, to go on. Nothing is ever deleted.
        """
        if not task.folder.exists() or _key(task, fingerprint) == task.key:
            return None
        name = "-".join(task.folder.relative_to(self.root).parts)
        moved = self.root / "replaced" / f"{name}-{uuid.uuid4().hex[:8]}"
        moved.parent.mkdir(exist_ok=True)
        os.rename(task.folder, moved)
        return f"{task.folder} is a run of another config: moved to {moved}, trained again"


def _key(task: TrainTask, fingerprint: str) -> str | None:
    """The key of what lies in a run's folder, finished or not; None if that cannot be known."""
    result = read_object(task.file)
    if result is not None:
        return result.get("key")
    try:
        cfg = parse(RunConfig, read_toml(task.folder / "config.toml"))
    except ConfigError:
        return None
    return config_hash(cfg, fingerprint)
