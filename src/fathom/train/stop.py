"""Stopping politely: the first Ctrl-C, SIGTERM or SIGUSR1 asks for a stop after the step in hand.

SIGTERM is what ``torchrun`` and schedulers send before they kill; SIGUSR1 what schedulers can be
told to send some time before (Slurm: ``--signal``).
"""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # Windows has none
    SIGNALS.append(signal.SIGUSR1)


class StopSignals:
    """Inside ``with``, ``stop()`` is True once a signal came; a second Ctrl-C ends at once.

    Outside the main thread, where Python takes no signals, nothing is installed.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
