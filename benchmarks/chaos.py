"""The large versions of the reliability tests, on the filesystems of this machine.

Writers killed during saves, alone and four together, damaged files, and a save broken at every
system call (``tests/faults.c``), in each of the folders named.

    python benchmarks/chaos.py --folders /dev/shm /var/tmp [--kills 20000] [--rank-kills 500]
                               [--flips 100000] [--minutes 10]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from records import limits, row, write  # noqa: E402

from fathom.chaos.saves import Tally, clear, kill_saves, spoil_files  # noqa: E402
from faults import a_checkpoint, every_point  # noqa: E402

AT_ONCE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=Path, nargs="+", default=[Path("/dev/shm")])
    parser.add_argument("--kills", type=int, default=20_000)
    parser.add_argument("--rank-kills", type=int, default=500)
    parser.add_argument("--flips", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=10, help="for each kind in each folder")
    args, _ = parser.parse_known_args()
    if "faults" not in os.environ.get("LD_PRELOAD", ""):
        sys.exit(run_with_faults())
    torch.set_num_threads(1)
    wanted = {
        "SIGKILL during saves": (kill_saves, args.kills),
        "SIGKILL of one or all of four ranks during saves": (
            partial(kill_saves, ranks=4),
            args.rank_kills,
        ),
        "bit flips and cuts": (spoil_files, args.flips),
    }
    rows = [one for folder in args.folders for one in measured(folder, wanted, 60 * args.minutes)]
    write("chaos" if args.kills else "chaos_ranks", rows, limits())


def run_with_faults() -> int:
    """This program again, with ``tests/faults.c`` preloaded."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "faults.so"
        build = ["cc", "-shared", "-fPIC", "-O1", "-o", library, TESTS / "faults.c", "-ldl"]
        subprocess.run(build, check=True)
        return subprocess.call(
            [sys.executable, *sys.argv], env={**os.environ, "LD_PRELOAD": str(library)}
        )


def measured(
    folder: Path, wanted: Mapping[str, tuple[Callable[..., Tally], int]], seconds: float
) -> Iterator[dict[str, Any]]:
    """The rows of one folder."""
    work = Path(tempfile.mkdtemp(prefix="fathom-chaos-", dir=folder))
    name, taken = filesystem(folder), a_checkpoint()
    found = every_point(work)
    trials = sum(found["outcomes"].values())
    yield counted(name, "a save broken at every system call", trials, found["failures"])
    for what, (do, times) in wanted.items():
        total, begun = Tally(), time.monotonic()
        while total.tries < times and time.monotonic() - begun < seconds:
            tally = do(clear(work / "run"), taken, min(AT_ONCE, times - total.tries), total.tries)
            total.tries += tally.tries
            total.hit += tally.hit
            total.failures += tally.failures
        if total.tries:
            yield counted(name, what, total.tries, total.failures)
            print(name, what, total.tries, "of", times, "in the middle:", total.hit, flush=True)
    shutil.rmtree(work)


def counted(case: str, what: str, tries: int, failures: list[str]) -> dict[str, Any]:
    for failure in failures[:3]:
        print(failure, flush=True)
    survived = tries - len(failures)
    return row(case, f"survived: {what}", "times", survived, {"tried": tries})


def filesystem(folder: Path) -> str:
    """Its kind, as the kernel calls it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    path = str(folder.resolve())
    over = [(at, kind) for at, kind in mounts if f"{path}/".startswith(f"{at.rstrip('/')}/")]
    return max(over, key=lambda mount: len(mount[0]))[1]


if __name__ == "__main__":
    main()
