"""A rank that dies or hangs is named by the others, long before an exchange with it times out.

Every rank has a heart, a thread that counts up in the run's store once a second, and listens to the
heart of the next rank. A heart that stops (the process has died, or is stopped) ends all ranks. A
rank whose heart beats but for which others wait is named and left alone: it may be saving a large
checkpoint, and ``parallel.timeout`` says how long that may take. A store that does not answer (the
network is down: nothing is refused, nothing comes) ends the rank that asks.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torch.distributed.distributed_c10d import Store

BEAT = 1.0  # seconds
SILENCE = 15.0  # seconds, after which a rank is given up, or named


class Watch:
    """The heart of this rank, and its ear.

    Args:
        store: a connection to the run's store that nothing else uses.
        rank, world: this rank, and how many there are.
        passed: how many exchanges this rank has entered; one for which others wait has entered
            fewer than they.
        end: what to do once a rank is given up.
        beat: seconds between beats.
        silence: seconds after which a rank is given up, or named.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        passed: Callable[[], int],
        *,
        end: Callable[[], None] | None = None,
        beat: float = BEAT,
        silence: float = SILENCE,
    ) -> None:
        self.store, self.rank, self.next = store, rank, (rank + 1) % world
        self.passed, self.end = passed, end or _end
        self.beat, self.silence = beat, silence
        self.heart, self.theirs, self.ours = Still(), Still(), Still()
        self.named = -1  # what the next rank had passed when it was last named
        self._answered = time.monotonic()
        self._over, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._other = threading.Thread(target=self._run_beside, name="watch-store", daemon=True)

    def start(self) -> None:
        """Begin to beat and to listen."""
        self._thread.start()
        self._other.start()

    def stop(self, error: BaseException | None = None) -> None:
        """End well; or because of an ``error``, which ends the others too.

        If the error is that of a broken exchange, another rank is to blame: there is time to learn
        which one.
        """
        if error is not None and is_broken_exchange(error):
            self._thread.join(2 * self.silence)
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store has gone, with the rank that held it
            if error is not None:
                self._give_up(self.rank, "ended with an error")
            self.store.set(f"left.{self.rank}", "1")
        self._done.set()
        self._other.join()

    def _run(self) -> None:
        verdict = None
        while verdict is None:
            try:
                verdict = self._beat()
                if verdict is None:
                    self._listen()
            except RuntimeError:  # the store cannot be reached
                if self._over.wait(3 * self.beat):
                    return
                verdict = "rank 0, or what started it, has ended"
            self._answered = time.monotonic()
            if verdict is None and self._over.wait(self.beat):
                return
        self._done.set()
        say(self.rank, f"{verdict}; ending")
        self.end()

    def _run_beside(self) -> None:
        """Look after the other thread, which an answer that never comes would hold for ever."""
        while not self._done.wait(self.beat):
            if time.monotonic() - self._answered > self.silence:
                say(self.rank, f"no answer in {self.silence:g} seconds, is the network up? ending")
                self.end()
                return

    def _beat(self) -> str | None:
        """Show that this rank lives; the sentence about one that does not, if there is one."""
        self.store.add(f"heart.{self.rank}", 1)
        self.store.set(f"passed.{self.rank}", str(self.passed()))
        return self.store.get("lost").decode() if self.store.check(["lost"]) else None

    def _listen(self) -> None:
        """Give up the next rank if its heart is still; name it if this one waits for it."""
        if self.store.check([f"left.{self.next}"]):
            return
        if self.heart.seconds(self.store.add(f"heart.{self.next}", 0)) > self.silence:
            self._give_up(self.next, f"was not heard of for {self.silence:g} seconds")
            return
        if not self.store.check([f"passed.{self.next}"]):
            return
        mine, passed = self.passed(), int(self.store.get(f"passed.{self.next}"))
        waited = min(self.theirs.seconds(passed), self.ours.seconds(mine))
        if passed < mine and waited > self.silence and self.named != passed:
            self.named = passed
            say(self.rank, f"waiting for rank {self.next} for {self.silence:g} seconds")

    def _give_up(self, rank: int, why: str) -> None:
        """Tell all; the first to say it is believed."""
        self.store.compare_set("lost", "", f"rank {rank} {why}")


class Still:
    """For how long a number has not changed."""

    def __init__(self) -> None:
        self.value, self.since = -1, time.monotonic()

    def seconds(self, value: int) -> float:
        """Take in the present value."""
        if value != self.value:
            self.value, self.since = value, time.monotonic()
        return time.monotonic() - self.since


def is_broken_exchange(error: BaseException) -> bool:
    """Whether another rank has gone in the middle of an exchange with this one."""
    words = ("gloo", "nccl", "connection")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def say(rank: int, sentence: str) -> None:
    """A line that names its rank, at once."""
    print(f"rank {rank}: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


def _end() -> None:
    """The process, whose main thread waits for a rank that is gone and takes no exception."""
    os._exit(1)
