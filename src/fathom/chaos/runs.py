"""A whole run under fire: killed, stopped, halted, robbed of its newest checkpoint, out of disk.

Each scenario trains a short run of the given config in processes of its own and compares it, record
for record and byte for byte, with one that nothing happened to.
"""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fathom.chaos.children import KILLED, Child
from fathom.chaos.saves import clear
from fathom.convert.run_folder import CHECKPOINTS, CONFIG, MANIFEST, committed, step_of
from fathom.data.dataset import Dataset
from fathom.train.config import RunConfig
from fathom.train.loop import train
from fathom.train.metrics import read_lines

MAX_STARTS = 60
TIMINGS = ("tokens_per_second", "memory_bytes", "mfu")


@dataclass(frozen=True)
class Field:
    """Where the scenarios take place.

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
        return self.draw.uniform(0, self.seconds)

    def start(self, run: Path, cfg: RunConfig | None = None) -> Child:
        """A process that trains in ``run``."""
        work = lambda: train(cfg or self.cfg, run, dataset=self.dataset).exit_code  # noqa: E731
        return Child(work, log=self.log(run))

    def log(self, run: Path) -> Path:
        """What the processes of a run have said."""
        return run.with_suffix(".log")

    def said(self, run: Path) -> str:
        return self.log(run).read_text() if self.log(run).exists() else ""

    def finish(self, run: Path) -> str | None:
        """Train to the end; what is wrong then, or None."""
        code = self.start(run).wait()
        if code != 0:
            return f"it did not go on: exit code {code}, {self.said(run).strip()[-200:]}"
        return difference(run, self.whole)


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
    code = field.start(field.whole).wait()
    if code != 0:
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


# --- Scenarios: each takes a field and an own folder, and says what went wrong ---


def killed(field: Field, run: Path) -> str | None:
    """SIGKILL at random moments, until the run is done."""
    for _ in range(MAX_STARTS):
        code = field.start(run).kill_after(field.moment())
        if code not in (0, KILLED):
            return f"exit code {code}: {field.said(run).strip()[-200:]}"
        if code == 0:
            break
    return field.finish(run)


def killed_in_background_saves(field: Field, run: Path) -> str | None:
    """SIGKILL at random moments of a run with asynchronous saves, until it is done."""
    cfg = replace(field.cfg, train=replace(field.cfg.train, async_save=True))
    code = KILLED
    for _ in range(MAX_STARTS):
        code = field.start(run, cfg).kill_after(field.moment()) if code == KILLED else code
    code = field.start(run, cfg).wait() if code == KILLED else code
    if code != 0:
        return f"exit code {code}: {field.said(run).strip()[-200:]}"
    return difference(run, field.whole, ignoring={CONFIG, MANIFEST})


def terminated(field: Field, run: Path) -> str | None:
    """SIGTERM: saved and exit code 75 within ten seconds, then on."""
    child = field.start(run)
    appears(run / "metrics.jsonl")
    time.sleep(field.moment() / 4)
    child.send(signal.SIGTERM)
    code = child.wait_at_most(10)
    if code not in (0, 75):
        return f"exit code {code} ten seconds after SIGTERM"
    return field.finish(run)


def halted(field: Field, run: Path) -> str | None:
    """SIGSTOP for a second, then SIGCONT."""
    child = field.start(run)
    time.sleep(field.moment())
    with suppress(ProcessLookupError):
        child.send(signal.SIGSTOP)
        time.sleep(1)
        child.send(signal.SIGCONT)
    code = child.wait()
    return f"exit code {code}" if code else difference(run, field.whole)


def robbed(field: Field, run: Path) -> str | None:
    """The newest checkpoint's folder disappears between two starts."""
    _half(field, run)
    shutil.rmtree(committed(run)[-1])
    return field.finish(run)


def truncated(field: Field, run: Path) -> str | None:
    """The newest manifest is cut in the middle: the checkpoint before it is taken, aloud."""
    _half(field, run)
    manifest = committed(run)[-1] / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])
    return field.finish(run)


def from_the_future(field: Field, run: Path) -> str | None:
    """The newest checkpoint has a format that is not known yet: the one before it is taken."""
    _half(field, run)
    manifest = committed(run)[-1] / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    return field.finish(run)


def clock_back(field: Field, run: Path) -> str | None:
    """The clock jumps back a year: the newest files look the oldest."""
    _half(field, run)
    past = time.time() - 365 * 86400
    for path in committed(run)[-1].iterdir():
        os.utime(path, (past, past))
    return field.finish(run)


def crowded(field: Field, run: Path) -> str | None:
    """A second run in the same folder is refused, and the first goes on."""
    first = field.start(run)
    appears(run / "metrics.jsonl")
    first.send(signal.SIGSTOP)
    code = field.start(run).wait()
    first.send(signal.SIGCONT)
    if code != 2 or "another process is training" not in field.said(run):
        first.wait()
        return f"the second got exit code {code}"
    return difference(run, field.whole) if first.wait() == 0 else "the first one failed"


def changed(field: Field, run: Path) -> str | None:
    """Another learning rate is refused with both values; the run goes on with the old one."""
    _half(field, run)
    other = replace(field.cfg, train=replace(field.cfg.train, lr=field.cfg.train.lr * 2))
    code = field.start(run, other).wait()
    if code != 2 or f"train.lr was {field.cfg.train.lr} and is" not in field.said(run):
        return f"exit code {code} for a changed learning rate"
    return field.finish(run)


def out_of_disk(field: Field, run: Path) -> str | None:
    """Files cannot grow any more (as on a full disk): the save fails, the one before it stays."""
    _half(field, run)
    before = committed(run)
    size = max(path.stat().st_size for path in before[-1].iterdir())

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        return train(field.cfg, run, dataset=field.dataset).exit_code

    code = Child(work, log=field.log(run)).wait()
    if code != 1 or "the checkpoints before it are untouched" not in field.said(run):
        return f"exit code {code}, {field.said(run).strip()[-200:]}"
    if committed(run) != before or any(".tmp-" in p.name for p in before[-1].parent.iterdir()):
        return "the checkpoints before it were touched"
    return field.finish(run)


def read_only(field: Field, run: Path) -> str | None:
    """The folder of checkpoints cannot be written any more: said, and nothing is lost."""
    _half(field, run)
    folder = run / CHECKPOINTS
    if os.geteuid() == 0:
        return "not done: root may write everywhere"
    folder.chmod(0o500)
    code = field.start(run).wait()
    folder.chmod(0o700)
    return field.finish(run) if code == 1 else f"exit code {code}"


def _half(field: Field, run: Path) -> None:
    """Train until two checkpoints are there, and one step of a third is done at most."""
    steps = 5

    def work() -> int:
        done = iter(range(1, steps + 1))
        return train(
            field.cfg, run, dataset=field.dataset, should_stop=lambda: next(done) == steps
        ).exit_code

    code = Child(work, log=field.log(run)).wait()
    assert code == 75, field.said(run)
    assert [step_of(folder) for folder in committed(run)] == [4, 5]


SCENARIOS: tuple[Callable[[Field, Path], str | None], ...] = (
    *(killed, killed_in_background_saves, terminated, halted, robbed, truncated),
    *(from_the_future, clock_back, crowded, changed, out_of_disk, read_only),
)
