"""A run that hangs says where: all stacks are shown and the process ends, so that others may know.

A step is missing when none has ended for ten times the median step and at least five minutes.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from types import TracebackType

LEAST_SECONDS = 300.0
TIMES_MEDIAN = 10.0


class Watchdog:
    """Inside ``with``, the process ends if a step that is under way does not.

    Args:
        least: seconds that any step may take.
        who: named in the message, where there are several processes.
    """

    def __init__(self, least: float = LEAST_SECONDS, who: str = "") -> None:
        self.least, self.who = least, who
        self._paces: deque[float] = deque(maxlen=50)
        self._began: float | None = None  # None: no step is under way
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self, step: int) -> None:
        """Step ``step`` is under way. The first of a process, which may compile, is not watched."""
        self._step, self._began = step, time.monotonic()

    def end(self) -> None:
        """It has ended; what follows, until the next one begins, may take any time."""
        if self._began is not None:
            self._paces.append(time.monotonic() - self._began)
        self._began = None

    @property
    def limit(self) -> float:
        """Seconds after which a step is missing."""
        return max(self.least, TIMES_MEDIAN * statistics.median(self._paces or [0.0]))

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(self.least / 4, 5.0)):
            began = self._began
            if began is not None and self._paces and time.monotonic() - began > self.limit:
                self._end()

    def _end(self) -> None:
        stream = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback(stream, all_threads=True)
        stream.write(
            f"error: {self.who}step {self._step} has not ended for {self.limit:.0f} seconds; "
            "above is where each thread stands; start the run again to go on from its newest "
            "checkpoint\n"
        )
        stream.flush()
        os._exit(1)
