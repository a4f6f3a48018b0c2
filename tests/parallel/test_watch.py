"""A heart that stops ends the others; one that beats but is behind is only named."""

import threading
import time

import pytest
from torch.distributed import HashStore

from fathom.parallel.watch import Watch, is_broken_exchange

QUICK = {"beat": 0.02, "silence": 0.4}


class Ranks:
    """The watches of three ranks in one process, each of which may be stopped dead."""

    def __init__(self) -> None:
        self.store = HashStore()
        self.passed = [5, 5, 5]
        self.ended = [threading.Event() for _ in range(3)]
        self.watches = [
            Watch(self.store, rank, 3, self.passing(rank), end=self.ended[rank].set, **QUICK)
            for rank in range(3)
        ]
        for watch in self.watches:
            watch.start()

    def passing(self, rank: int):
        return lambda: self.passed[rank]

    def kill(self, rank: int) -> None:
        self.watches[rank]._over.set()
        self.watches[rank]._done.set()


@pytest.fixture
def ranks():
    found = Ranks()
    yield found
    for watch in found.watches:
        watch.stop()


def test_a_rank_that_is_gone_before_its_first_beat_is_named_too(capsys):
    ended = threading.Event()
    alone = Watch(HashStore(), 0, 2, lambda: 5, end=ended.set, **QUICK)
    alone.start()
    assert ended.wait(10)
    alone.stop()
    assert "rank 1 was not heard of for 0.4 seconds; ending" in capsys.readouterr().err


@pytest.mark.parametrize("dead", range(3))
def test_a_rank_that_falls_silent_is_named_by_all_others(ranks, capsys, dead):
    time.sleep(0.1)
    ranks.kill(dead)
    others = [rank for rank in range(3) if rank != dead]
    assert all(ranks.ended[rank].wait(10) for rank in others)
    lines = capsys.readouterr().err.splitlines()
    sentence = f"rank {dead} was not heard of for 0.4 seconds; ending"
    assert sorted(lines) == [f"rank {rank}: {sentence}" for rank in others]


def test_a_rank_that_others_wait_for_is_named_once_and_lives(ranks, capsys):
    ranks.passed[:] = [6, 5, 6]
    time.sleep(1.0)
    assert not any(event.is_set() for event in ranks.ended)
    assert capsys.readouterr().err == "rank 0: waiting for rank 1 for 0.4 seconds\n"


def test_a_rank_that_ends_with_an_error_ends_the_others(ranks, capsys):
    ranks.watches[1].stop(ValueError("a bug"))
    assert ranks.ended[0].wait(10)
    assert ranks.ended[2].wait(10)
    assert "rank 0: rank 1 ended with an error; ending" in capsys.readouterr().err


def test_a_broken_exchange_is_blamed_on_the_rank_that_fell_silent(ranks, capsys):
    time.sleep(0.1)
    ranks.kill(2)
    ranks.watches[1].stop(RuntimeError("[gloo/tcp] Connection closed by peer"))
    assert ranks.ended[0].wait(10)
    assert "rank 1 ended" not in capsys.readouterr().err


def test_a_rank_that_leaves_well_is_not_missed(ranks):
    ranks.watches[1].stop()
    time.sleep(0.5)
    assert not any(event.is_set() for event in ranks.ended)


class Unanswering(HashStore):
    """A store on the other side of a network that is down from some moment on."""

    down = False

    def add(self, key: str, value: int) -> int:
        self.wait_until_up()
        return super().add(key, value)

    def set(self, key: str, value: str) -> None:
        self.wait_until_up()
        super().set(key, value)

    def wait_until_up(self) -> None:
        while self.down:
            time.sleep(0.01)


@pytest.mark.parametrize("leaving", [False, True], ids=["in a step", "at the end"])
def test_a_store_that_never_answers_ends_the_rank_that_asks(capsys, leaving):
    store, ended = Unanswering(), threading.Event()
    store.set("left.0", "1")
    watch = Watch(store, 1, 2, lambda: 5, end=ended.set, **QUICK)
    watch.start()
    time.sleep(0.1)
    store.down = True
    stop = threading.Thread(target=watch.stop)
    if leaving:
        stop.start()
    assert ended.wait(10)
    assert capsys.readouterr().err == (
        "rank 1: no answer in 0.4 seconds, is the network up? ending\n"
    )
    store.down = False
    if not leaving:
        stop.start()
    stop.join()


def test_errors_of_exchanges_are_told_from_others():
    assert is_broken_exchange(RuntimeError("NCCL error: remote process exited"))
    assert not is_broken_exchange(RuntimeError("shapes differ"))
    assert not is_broken_exchange(ValueError("connection"))
