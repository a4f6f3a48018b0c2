"""A run under fire: killed, stopped, robbed of its newest checkpoint, out of disk or memory.

Each scenario trains a short run of the given config in processes of its own and compares it, record
for record and byte for byte, with one that nothing happened to. It takes a field and an own folder,
and says what went wrong.
"""

import os
import resource
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fathom.chaos.children import KILLED, Child
from fathom.chaos.field import Field, Scenario, appears, difference
from fathom.convert.run_folder import CHECKPOINTS, CONFIG, MANIFEST, committed

MAX_STARTS = 60


def killed(field: Field, run: Path) -> str | None:
    """SIGKILL at random moments, until the run is done."""
    for _ in range(MAX_STARTS):
        code = field.start(run).kill_after(field.moment())
        if code not in (0, KILLED):
            return field.ended(run, code)
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
        return field.ended(run, code)
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
    """The newest checkpoint's folder disappears while the run starts: the next goes on."""
    field.half(run)
    child = field.start(run)
    time.sleep(field.moment() / 4)
    shutil.rmtree(committed(run)[-1], ignore_errors=True)
    code = child.wait()
    return field.finish(run) if code in (0, 1, 3) else field.ended(run, code)


def truncated(field: Field, run: Path) -> str | None:
    """The newest manifest is cut in the middle: the checkpoint before it is taken, aloud."""
    field.half(run)
    manifest = committed(run)[-1] / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])
    return field.finish(run)


def from_the_future(field: Field, run: Path) -> str | None:
    """The newest checkpoint has a format that is not known yet: the one before it is taken."""
    field.half(run)
    manifest = committed(run)[-1] / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    return field.finish(run)


def clock_back(field: Field, run: Path) -> str | None:
    """The clock jumps back a year: the newest files look the oldest."""
    field.half(run)
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
    field.half(run)
    other = replace(field.cfg, train=replace(field.cfg.train, lr=field.cfg.train.lr * 2))
    code = field.start(run, other).wait()
    if code != 2 or f"train.lr was {field.cfg.train.lr} and is" not in field.said(run):
        return f"exit code {code} for a changed learning rate"
    return field.finish(run)


def out_of_disk(field: Field, run: Path) -> str | None:
    """Files cannot grow any more (as on a full disk): the save fails, the one before it stays."""
    field.half(run)
    before = committed(run)
    size = max(path.stat().st_size for path in before[-1].iterdir())

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        return field.work(run)()

    code = Child(work, log=field.log(run)).wait()
    if code != 1 or "the checkpoints before it are untouched" not in field.said(run):
        return field.ended(run, code)
    if committed(run) != before or any(".tmp-" in p.name for p in before[-1].parent.iterdir()):
        return "the checkpoints before it were touched"
    return field.finish(run)


def read_only(field: Field, run: Path) -> str | None:
    """The folder of checkpoints cannot be written any more: said, and nothing is lost."""
    field.half(run)
    folder = run / CHECKPOINTS
    if os.geteuid() == 0:
        return "not done: root may write everywhere"
    folder.chmod(0o500)
    code = field.start(run).wait()
    folder.chmod(0o700)
    return field.finish(run) if code == 1 else field.ended(run, code)


def slow_disk(field: Field, run: Path) -> str | None:
    """Every fsync takes 100 milliseconds, and SIGKILL comes in between."""

    def work() -> int:
        sync = os.fsync
        os.fsync = lambda handle: time.sleep(0.1) or sync(handle)
        return field.work(run)()

    code = KILLED
    for _ in range(3):
        code = Child(work, log=field.log(run)).kill_after(1 + field.moment())
        if code not in (0, KILLED):
            return field.ended(run, code)
    code = Child(work, log=field.log(run)).wait()
    return field.finish(run) if code == 0 else field.ended(run, code)


def other_tmpdir(field: Field, run: Path) -> str | None:
    """TMPDIR is on another filesystem, from where nothing can be renamed into the run."""
    here = field.folder.stat().st_dev
    others = [p for p in map(Path, ("/dev/shm", "/tmp", "/var/tmp")) if p.is_dir()]
    other = next((str(path) for path in others if path.stat().st_dev != here), None)
    if other is None:
        return "not done: there is no second filesystem to put TMPDIR on"

    def work() -> int:
        os.environ["TMPDIR"] = tempfile.tempdir = other
        return field.work(run)()

    code = Child(work, log=field.log(run)).wait()
    return difference(run, field.whole) if code == 0 else field.ended(run, code)


def out_of_memory(field: Field, run: Path) -> str | None:
    """No more memory is to be had: said with what would fit, and the run goes on when there is."""
    field.half(run)

    def work() -> int:
        with Path("/proc/self/statm").open() as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        return field.work(run)()

    if not Path("/proc/self/statm").exists():
        return "not done: this system does not tell how much memory is in use"
    code = Child(work, log=field.log(run)).wait()
    return field.finish(run) if code == 1 else field.ended(run, code)


SCENARIOS: tuple[Scenario, ...] = (
    *(killed, killed_in_background_saves, terminated, halted, robbed, truncated),
    *(from_the_future, clock_back, crowded, changed, out_of_disk, read_only),
    *(slow_disk, other_tmpdir, out_of_memory),
)
