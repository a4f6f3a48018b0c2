"""Worker processes, started once: a task that fails or kills its worker costs nothing but itself.

``concurrent.futures`` gives up the whole pool when one process dies, and a run that is out of
memory dies like that; here the dead worker's task becomes a failure and a new worker takes over.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from fathom.ladder.task import Task, perform
from fathom.settings import Data

AnyTask = TypeVar("AnyTask", bound=Task)
SHUTDOWN_SECONDS = 30.0


@dataclass(frozen=True)
class Failed:
    """In the place of a result: why there is none, in one line."""

    reason: str


@dataclass(frozen=True)
class Stopped:
    """A worker's answer when it was told to stop: the task can go on later."""


class Worker:
    """One process, and our end of the pipe to it."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked CUDA context does not work
        self.pipe, there = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(there, threads), daemon=False
        )
        self.process.start()
        there.close()
        self.arm: str | None = None

    def send(self, task: Task) -> None:
        """Give it a task. That it died while idle is noticed when its answer is read."""
        self.arm = task.arm
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def receive(self) -> Any:
        """The task's result or a :class:`Failed`; a dead process is a failure too."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Failed(_death(self.process.exitcode))

    def stop(self) -> None:
        """Ask it to end: a run in progress saves its state first."""
        if self.process.is_alive():
            self.process.terminate()


class Pool:
    """``jobs`` processes that do tasks with ``threads`` threads each.

    ``jobs = 0`` does everything in this process: for debugging, and where processes cannot be had.
    Tasks and results travel by pickle, between our own processes only. Use it as a context manager:
    leaving by an exception stops the workers.
    """

    def __init__(self, *, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            if error[0] is not None:
                worker.stop()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(SHUTDOWN_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def run(
        self,
        tasks: Sequence[AnyTask],
        started: Callable[[AnyTask], None] = lambda task: None,
        until: float = math.inf,
    ) -> Iterator[tuple[AnyTask, Data | Failed]]:
        """Every task with its result, as they finish; ``started`` is called when one begins.

        Args:
            until: a time of ``time.monotonic`` from which on no task begins.

        Raises:
            KeyboardInterrupt: a worker was told to stop; what it ran can go on later.
        """
        if self.jobs == 0:
            yield from self._run_here(tasks, started, until)
            return
        waiting = list(tasks)
        busy: dict[Connection, tuple[Worker, AnyTask]] = {}
        while busy or (waiting and time.monotonic() < until):
            while waiting and len(busy) < self.jobs and time.monotonic() < until:
                worker = self._worker()
                task = waiting.pop(
                    choose(
                        [task.arm for task in waiting],
                        last=worker.arm,
                        busy={task.arm for _, task in busy.values()},
                    )
                )
                worker.send(task)
                busy[worker.pipe] = (worker, task)
                started(task)
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, task = busy.pop(pipe)
                result = worker.receive()
                if isinstance(result, Stopped):
                    raise KeyboardInterrupt
                if isinstance(result, Failed):
                    self._dismiss(worker)
                else:
                    self._idle.append(worker)
                yield task, result

    def _worker(self) -> Worker:
        if not self._idle:
            self._workers.append(Worker(self.threads))
            return self._workers[-1]
        return self._idle.pop()

    def _dismiss(self, worker: Worker) -> None:
        """What failed may have left its process unfit for more (a CUDA error does)."""
        self._workers.remove(worker)
        worker.pipe.close()
        worker.stop()
        worker.process.join()

    def _run_here(
        self, tasks: Sequence[AnyTask], started: Callable[[AnyTask], None], until: float
    ) -> Iterator[tuple[AnyTask, Data | Failed]]:
        for task in tasks:
            if time.monotonic() >= until:
                return
            started(task)
            result = attempt(task)
            if isinstance(result, Stopped):
                raise KeyboardInterrupt
            yield task, result


def choose(arms: Sequence[str], *, last: str | None, busy: Set[str]) -> int:
    """Which of the waiting tasks, by their arms, a worker gets.

    Of the arm whose task was its last, and is compiled; else of one that nobody is at.
    """
    return min(range(len(arms)), key=lambda i: (arms[i] != last, arms[i] in busy, i))


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def attempt(task: Task) -> Data | Failed | Stopped:
    """Do a task, whatever happens."""
    try:
        return perform(task)
    except KeyboardInterrupt:
        return Stopped()
    except Exception as error:  # whatever an arm does, the other arms go on
        return Failed(reason(error))


def reason(error: Exception) -> str:
    """An exception in one line."""
    line = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {line}"[:300]


def _serve(pipe: Connection, threads: int) -> None:
    """A worker's life: tasks until the pipe closes, or until it is told to stop in one."""
    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            result = attempt(pipe.recv())
            pipe.send(result)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        if isinstance(result, Stopped):
            return


def _end_with_parent() -> None:
    """Stop as on SIGTERM when the parent is gone, so that nobody writes behind its successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ": out of memory, most likely" if name == "SIGKILL" else ""
        return f"the worker process was killed by {name}{hint}"
    return f"the worker process ended by itself with code {exitcode}"
