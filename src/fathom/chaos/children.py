"""Processes that may be killed: forked, so that none imports torch again.

Forking is safe as long as this process has computed nothing: OpenMP and autograd have no threads
yet, and CUDA has not begun.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401  here, so that no child has to: it takes seconds

from fathom.console import explain

KILLED = -signal.SIGKILL


class Child:
    """A forked process that does ``work``; its exit code is the answer, or that of its error.

    Args:
        log: takes what it prints; None: nobody does.
    """

    def __init__(self, work: Callable[[], int], log: Path | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            self.pid = os.fork()
        self.code: int | None = None  # None: it runs, as far as anyone has looked
        if self.pid == 0:
            _be_child(work, log)

    def send(self, number: signal.Signals) -> None:
        """A signal, which one that has ended no longer hears."""
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def wait_at_most(self, seconds: float) -> int | None:
        """The same, or None if it still runs then."""
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.002)
        return self.code

    def kill_after(self, seconds: float) -> int:
        """Its exit code: it ended by itself before, or is killed then."""
        if self.wait_at_most(seconds) is None:
            self.send(signal.SIGKILL)
        return self.wait()


def placed(work: Callable[[], int], rank: int, size: int, port: int) -> Callable[[], int]:
    """The same work for one of ``size`` processes, in the environment that ``torchrun`` gives."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def there() -> int:
        os.environ.update({name: str(value) for name, value in place.items()})
        return work()

    return there


def _be_child(work: Callable[[], int], log: Path | None) -> None:
    """Never returns: what stands above in the stack is the parent's."""
    code = 1
    try:
        to = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(to, 1)
        os.dup2(to, 2)
        sys.stdout = sys.stderr = os.fdopen(to, "w", closefd=False)
        code = work()
    except BaseException as error:
        code = explain(error)
    finally:
        sys.stderr.flush()
        os._exit(code)
