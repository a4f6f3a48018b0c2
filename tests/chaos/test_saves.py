"""A thousand killed writers and two thousand damaged files: nothing is lost, all is found."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.chaos import saves, writers
from fathom.chaos.saves import kill_saves, spoil_files
from fathom.convert.parts import write_tensors
from fathom.convert.ranks import Ranks
from fathom.convert.run_folder import MODEL, checkpoint_path, committed, remove


@pytest.fixture
def run(disk: Path) -> Iterator[Path]:
    yield disk
    shutil.rmtree(disk)


def test_of_a_thousand_kills_during_saves_none_loses_or_tears_a_checkpoint(run, taken):
    tally = kill_saves(run, taken, kills=1000)
    assert tally.failures == []
    assert tally.tries == 1000
    assert tally.hit > 200  # in the middle of a save


def test_four_ranks_of_which_one_or_all_are_killed_while_they_save_lose_nothing(run, taken):
    """Whoever is left leaves by itself, though it waits for a rank that is gone."""
    tally = kill_saves(run, taken, kills=16, ranks=4)
    assert tally.failures == []
    assert tally.tries == 16
    assert tally.hit > 4
    assert (committed(run)[-1] / "model.rank-00003.safetensors").exists()


def test_a_rank_that_stays_when_another_has_died_is_told(run, taken, monkeypatch):
    def deaf(folder: Path, taken: saves.Snapshot, ranks: Ranks) -> None:
        while ranks.rank == 1:
            time.sleep(1)
        real_save(folder, taken, ranks if ranks.size == 1 else None)

    real_save = writers.save
    monkeypatch.setattr(writers, "save", deaf)
    monkeypatch.setattr(writers, "LEAVE_SECONDS", 0.1)
    work = writers.Writers(run, taken, first=1, ranks=2)
    work.wait()
    assert work.kill([0]) == "rank 1 stayed when rank 0 had died"


def test_two_thousand_flips_and_cuts_are_all_found_and_the_one_before_is_taken(run, taken):
    tally = spoil_files(run, taken, times=2000)
    assert tally.failures == []
    assert tally.tries == 2000


def test_a_writer_that_is_not_atomic_is_found_out(run, taken, monkeypatch):
    def save_in_place(folder: Path, taken: saves.Snapshot, ranks: Ranks) -> None:
        final = checkpoint_path(folder, taken.step)
        real_save(folder, taken)
        for _ in range(20):  # and once more over the files that are there
            write_tensors(final / MODEL, {name: item + 1 for name, item in taken.model.items()})

    real_save = writers.save
    monkeypatch.setattr(writers, "save", save_in_place)
    assert len(kill_saves(run, taken, kills=20).failures) > 5


def test_a_checkpoint_that_vanishes_is_lost(run, taken, monkeypatch):
    real_save = writers.save

    def forgetful(folder: Path, taken: saves.Snapshot, ranks: Ranks) -> None:
        real_save(folder, taken)
        remove(checkpoint_path(folder, taken.step))

    monkeypatch.setattr(writers, "save", forgetful)
    failures = kill_saves(run, taken, kills=10).failures
    assert any(text.startswith("lost: ") for text in failures)


def test_damage_that_nobody_looks_for_is_told(run, taken, monkeypatch):
    monkeypatch.setattr(saves, "newest", lambda run, warn: checkpoint_path(run, 2))
    assert len(spoil_files(run, taken, times=5).failures) == 5
