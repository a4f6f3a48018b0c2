"""``fathom chaos`` on a very small run: everything is survived, and what is not would be told."""

import os

import pytest

from fathom.chaos import ranks, runs
from fathom.chaos.children import KILLED, Child
from fathom.chaos.report import chaos
from fathom.parallel.watch import Watch
from fathom.train.loop import Trainer
from fathom.train.step import Learner


@pytest.fixture
def quick_watch(monkeypatch):
    """Ranks that miss each other after two seconds, not fifteen."""
    for name, seconds in (("beat", 0.1), ("silence", 2.0)):
        monkeypatch.setitem(Watch.__init__.__kwdefaults__, name, seconds)


def test_a_run_survives_the_whole_list(cfg, tmp_path, quick_watch):
    rows = list(chaos(cfg, tmp_path / "chaos", steps=8, kills=5, flips=12))
    done = [row for row in rows if row.tries]
    assert [(row.what, row.note) for row in done if row.survived < row.tries] == []
    scenarios = len(runs.SCENARIOS) + len(ranks.SCENARIOS)
    skipped = {row.note.partition(":")[2].split()[0] for row in rows if not row.tries}
    assert len(rows) == scenarios + 2
    assert skipped <= {"root", "this"}  # may write everywhere; gives no network of one's own
    assert sum(row.tries for row in done) == len(done) - 2 + 5 + 12


def test_a_run_that_forgets_its_optimizer_is_found_out(cfg, tmp_path, monkeypatch):
    load = Learner.load

    def forgetful(self, start):
        load(self, start)
        for tensor in self.parts.optimizer.state().values():
            tensor.zero_()

    monkeypatch.setattr(Learner, "load", forgetful)
    (row,) = chaos(cfg, tmp_path / "chaos", steps=8, kills=0, flips=0, only="clock_back")
    assert (row.tries, row.survived) == (1, 0)
    assert row.note == "its records are not those of the run that nothing happened to"


def test_a_run_that_fails_by_itself_is_no_experiment(cfg, tmp_path, monkeypatch):
    def broken(self):
        raise ValueError("no such thing")

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(RuntimeError, match="fails without any harm: error: no such thing"):
        next(chaos(cfg, tmp_path / "chaos", steps=8))


def test_too_few_steps_for_three_checkpoints_are_refused(cfg, tmp_path):
    with pytest.raises(ValueError, match="--steps must be at least 6"):
        next(chaos(cfg, tmp_path / "chaos", steps=5))
    assert not (tmp_path / "chaos").exists()


def test_a_child_answers_with_its_code_its_error_or_its_signal(tmp_path):
    log = tmp_path / "log"
    assert Child(lambda: 7).wait() == 7
    assert Child(lambda: int("x"), log).wait() == 2
    assert "invalid literal" in log.read_text()

    def sleep() -> int:
        while True:
            os.sched_yield()

    assert Child(sleep).kill_after(0.01) == KILLED
    child = Child(sleep)
    assert child.wait_at_most(0.01) is None
    assert child.kill_after(0) == KILLED
