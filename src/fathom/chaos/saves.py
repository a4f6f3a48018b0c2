"""Checkpoints under fire: a writer is killed at any moment, files are cut and bits flipped.

What must hold afterwards: the newest checkpoint is whole, and no older than the last that the
writer knew to be committed.
"""

import random
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from fathom.chaos.writers import Writers
from fathom.convert.run_folder import (
    CHECKPOINTS,
    CheckpointError,
    checkpoint_path,
    committed,
    newest,
    step_of,
    sweep,
)
from fathom.train.checkpoint import Snapshot, save


@dataclass
class Tally:
    """How something went.

    Args:
        tries: how often it was done.
        hit: of these, how often in the middle of a save.
        failures: a sentence for each time that it was not survived.
    """

    tries: int = 0
    hit: int = 0
    failures: list[str] = field(default_factory=list)


def kill_saves(run: Path, taken: Snapshot, kills: int, seed: int = 0, *, ranks: int = 1) -> Tally:
    """Kill processes that save without pause, at random moments, and look what is left.

    Args:
        run: an empty folder on the filesystem in question.
        taken: what is saved, under ever higher steps.
        ranks: how many save together. One of them is killed, and the others must leave by
            themselves; or, every other time, all are.
    """
    draw, tally, step, one_save = random.Random(seed), Tally(), 0, 0.0
    save(run, replace(taken, step=step))
    for number in range(kills):
        writers = Writers(run, taken, first=step + 1, ranks=ranks)
        writers.wait()
        one_save = one_save or writers.wait()
        time.sleep(draw.uniform(0, 2.5 * one_save))
        tally.tries += 1
        tally.hit += any(".tmp-" in path.name for path in (run / CHECKPOINTS).iterdir())
        victims = range(ranks) if number % 2 else [draw.randrange(ranks)]
        problem = writers.kill(victims) or _look(run, at_least=writers.known)
        tally.failures += [problem] if problem else []
        step = step_of(committed(run)[-1])
    return tally


def _look(run: Path, at_least: int) -> str | None:
    """What is wrong with a run folder after its writer's death; None: nothing."""
    sweep(run)
    damaged: list[str] = []
    try:
        found = newest(run, warn=damaged.append)
    except CheckpointError as error:
        return f"lost: {error}"
    if found is None or step_of(found) < at_least:
        return f"lost: {found} is the newest, and step {at_least} had been committed"
    return f"torn: {damaged[0]}" if damaged else None


def spoil_files(run: Path, taken: Snapshot, times: int, seed: int = 0) -> Tally:
    """Flip one bit, or cut the end, of a file of the newest checkpoint: it must be found.

    And the one before must be taken. Every file has its turn; half the times a bit is flipped.
    """
    draw, tally = random.Random(seed), Tally()
    for step in (1, 2):
        save(run, replace(taken, step=step))
    before, last = checkpoint_path(run, 1), checkpoint_path(run, 2)
    files = sorted(last.iterdir())
    for number in range(times):
        path = files[number % len(files)]
        what = _spoil(path, draw, cut=bool(number // len(files) % 2))
        tally.tries += 1
        tally.hit += 1
        told: list[str] = []
        found = newest(run, warn=told.append)
        if found != before or len(told) != 1:
            tally.failures.append(f"{what} was not found")
        _mend(path, what)
    return tally


@dataclass(frozen=True)
class Damage:
    """A flipped bit, or the bytes that were cut off."""

    file: str
    flipped: int | None
    cut: bytes = b""

    def __str__(self) -> str:
        how = f"{len(self.cut)} bytes cut off" if self.flipped is None else f"bit {self.flipped}"
        return f"{self.file}: {how}"


def _spoil(path: Path, draw: random.Random, *, cut: bool) -> Damage:
    size = path.stat().st_size
    if cut:
        left = draw.randrange(size)
        with path.open("rb+") as file:
            file.seek(left)
            rest = file.read()
            file.truncate(left)
        return Damage(path.name, None, rest)
    bit = draw.randrange(size * 8)
    _flip(path, bit)
    return Damage(path.name, bit)


def _flip(path: Path, bit: int) -> None:
    with path.open("rb+") as file:
        file.seek(bit // 8)
        (value,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def _mend(path: Path, damage: Damage) -> None:
    if damage.flipped is not None:
        _flip(path, damage.flipped)
        return
    with path.open("ab") as file:
        file.write(damage.cut)


def clear(run: Path) -> Path:
    """An empty folder at ``run``."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    return run
