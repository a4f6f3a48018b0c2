"""``fathom train --nproc N``: N ranks on this machine, with the environment of ``torchrun``.

Plainer than ``torchrun`` (no restarts, no other hosts), and it ends with the run's own exit code.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

FINE = (None, 0, 75)  # running, done, interrupted and saved
GRACE = 30.0  # seconds that ranks get to end by themselves once one has failed


def launch(nproc: int, args: Sequence[str]) -> int:
    """Run ``fathom ARGS`` in ``nproc`` processes.

    Returns:
        Rank 0's exit code if it failed, else that of the first that did; 0 if none has.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // nproc, 1))}
    command = [sys.executable, "-m", "fathom", *args]
    ranks: list[subprocess.Popen[bytes]] = []
    with passed_on(ranks):
        for rank in map(str, range(nproc)):
            place = {"RANK": rank, "LOCAL_RANK": rank}
            env = {**threads, **os.environ, **address, **sizes, **place}
            ranks.append(subprocess.Popen(command, env=env))
        return wait_for(ranks)


def wait_for(ranks: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait for all; once one has failed the others get ``GRACE`` to end by themselves."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        failed = [number for number, rank in enumerate(ranks) if rank.poll() not in FINE]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
            code = ranks[failed[0]].returncode
            if code < 0:
                name = signal.Signals(-code).name
                print(f"rank {failed[0]} was ended by {name}", file=sys.stderr)  # noqa: T201
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    codes = [rank.returncode for rank in ranks]
    first = codes[0] or next((code for code in codes if code), 0)
    return first if first >= 0 else 1


@contextmanager
def passed_on(ranks: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Signals go to the ranks, which decide; a terminal's Ctrl-C reaches them by itself."""

    def handle(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, handle),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
