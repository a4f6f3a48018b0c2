"""What guards a run folder: one run at a time, room on the disk, and nobody else's results."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fathom.convert.run_folder import CHECKPOINTS, CONFIG, committed

try:
    import fcntl
except ImportError:  # Windows has no flock: a second run is not noticed there
    fcntl = None

OURS = (CONFIG, "env.json", "metrics.jsonl", "eval.jsonl", CHECKPOINTS)


def check_disk(run: Path, needed: int, keep: int) -> str | None:
    """Whether checkpoints of ``needed`` bytes will fit: a sentence if room is short, else None.

    Raises:
        OSError: not one more fits.
    """
    free = shutil.disk_usage(run).free
    room = f"{run} has {free / 1e6:,.0f} MB free and a checkpoint takes {needed / 1e6:,.0f} MB"
    if free < 1.05 * needed:
        raise OSError(f"{room}: make room, or name another folder with --out")
    to_come = keep + 1 - len(committed(run))  # a new one is written before the oldest goes
    if free < to_come * needed:
        return f"{room}, of which {to_come} more will lie there (train.keep={keep} and the next)"
    return None


def check_folder(run: Path) -> None:
    """Refuse a folder that holds results but no config: whose they are cannot be known.

    Raises:
        ValueError: with the file that is there.
    """
    found = [name for name in OURS if (run / name).exists()]
    if found and CONFIG not in found:
        raise ValueError(f"{run} holds {found[0]} but no {CONFIG}: name another folder with --out")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder, which is made if it is not there, against a second run.

    Raises:
        ValueError: another process trains in it, or it cannot be written.
    """
    lock = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"the run folder {run} cannot be written: {error.strerror}") from None
    try:
        _flock(handle, run)
        yield
    finally:
        if [path.name for path in run.iterdir()] == [lock.name]:  # refused: leave nothing behind
            lock.unlink()
            run.rmdir()
        os.close(handle)


def _flock(handle: int, run: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is training in {run}: wait for it, or name another folder with --out"
        ) from None
