"""A run of several ranks under fire: one dies or hangs, and the others must leave and say who.

What is left of it goes on as the run that nothing happened to. Scenarios as those of ``runs.py``.
"""

import ctypes
import fcntl
import signal
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fathom.chaos.children import Child
from fathom.chaos.field import Field, Scenario
from fathom.chaos.writers import LEAVE_SECONDS
from fathom.config import ParallelConfig
from fathom.train.config import RunConfig
from fathom.train.metrics import read_lines

RANKS = 2
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
NOT_DONE = 99


def together(cfg: RunConfig) -> RunConfig:
    """The same run on the CPU by several ranks: its own layout if that is no larger, or ``dp``.

    Raises:
        ConfigError: its batches cannot be shared by so many.
    """
    own = 1 < cfg.parallel.world <= RANKS
    layout = cfg.parallel if own else ParallelConfig(dp=RANKS)
    return replace(cfg, parallel=layout, train=replace(cfg.train, device="cpu"))


def rank_killed(field: Field, run: Path) -> str | None:
    """The last rank is killed at any moment: the others leave within 30 seconds and name it."""
    return _without(field, run, RANKS - 1, signal.SIGKILL) or field.finish(run)


def first_rank_killed(field: Field, run: Path) -> str | None:
    """Rank 0 is killed, which writes and holds the meeting place of all: the others leave too."""
    return _without(field, run, 0, signal.SIGKILL) or field.finish(run)


def rank_hangs(field: Field, run: Path) -> str | None:
    """A rank is stopped and never goes on: the others leave within 30 seconds and name it."""
    return _without(field, run, RANKS - 1, signal.SIGSTOP) or field.finish(run)


def all_terminated(field: Field, run: Path) -> str | None:
    """SIGTERM to all ranks, as by torchrun: saved and exit code 75 within ten seconds, then on."""
    ranks = field.start_ranks(run)
    _in_the_middle(field, run)
    for child in ranks:
        child.send(signal.SIGTERM)
    codes = [child.wait_at_most(10) for child in ranks]
    if set(codes) in ({0}, {75}):
        return field.finish(run)
    _end(ranks)
    return f"exit codes {codes} ten seconds after SIGTERM"


def unplugged(field: Field, run: Path) -> str | None:
    """The network between the ranks goes down: they leave within 30 seconds."""

    def work() -> int:
        try:
            own_network()
        except OSError:
            return NOT_DONE
        ranks = field.start_ranks(run)
        _in_the_middle(field, run)
        loopback(up=False)
        codes = [child.wait_at_most(LEAVE_SECONDS) for child in ranks]
        _end(ranks)
        return int(None in codes)

    code = Child(work, log=field.log(run)).wait()
    if code == NOT_DONE:
        return "not done: this system gives no network of one's own (Linux user namespaces do)"
    if code != 0:
        return f"a rank stayed for {LEAVE_SECONDS:.0f} seconds without a network"
    return field.finish(run)


def own_network() -> None:
    """Give this process, and those that it forks, a network of which nobody else has a part.

    Raises:
        OSError: the system does not allow it.
    """
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    if unshare is None or unshare(NEW_USER | NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")
    loopback(up=True)


def loopback(*, up: bool) -> None:
    """Set this network's only interface up or down: ``ioctl(SIOCSIFFLAGS)`` with IFF_UP or not."""
    request = struct.pack("16sh", b"lo", int(up)).ljust(40, b"\0")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)


def _without(field: Field, run: Path, lost: int, how: signal.Signals) -> str | None:
    """Train until something happens to one rank; what is wrong with the end of the others."""
    ranks = field.start_ranks(run)
    _in_the_middle(field, run)
    ranks[lost].send(how)
    codes = [ranks[rank].wait_at_most(LEAVE_SECONDS) for rank in range(RANKS) if rank != lost]
    done = not any(codes) and None not in codes
    _end(ranks)
    if done:
        return None  # it was so late that nobody needed the rank any more
    if None in codes:
        return f"a rank stayed for {LEAVE_SECONDS:.0f} seconds when rank {lost} had gone"
    if f"rank {lost}" not in field.said(run):
        return f"nobody named rank {lost}: {field.said(run).strip()[-200:]}"
    return None


def _in_the_middle(field: Field, run: Path) -> None:
    """Wait until some step is written down, with at least two to come."""
    step = field.draw.randint(1, field.cfg.train.steps - 3)
    until = time.monotonic() + 60
    while time.monotonic() < until and len(read_lines(run / "metrics.jsonl")) < step:
        time.sleep(0.002)


def _end(ranks: Sequence[Child]) -> None:
    """Of whoever is left."""
    for child in ranks:
        child.kill_after(0)


SCENARIOS: tuple[Scenario, ...] = (
    *(rank_killed, first_rank_killed, rank_hangs, unplugged, all_terminated),
)
