"""Saving while training goes on: the copy is stable, one save at a time, errors end the run."""

import threading

import pytest
import torch

from fathom.convert.parts import cut
from fathom.convert.run_folder import committed
from fathom.model import build_model
from fathom.train import saver
from fathom.train.checkpoint import Parts, restore, snapshot
from fathom.train.guards import SpikeGuard
from fathom.train.optim import Optimizer
from fathom.train.saver import Saver
from runs import files, records


@pytest.fixture
def parts(make_config) -> Parts:
    cfg = make_config()
    model = build_model(cfg.model, seed=3)
    return Parts(model, Optimizer(model, cfg.train), SpikeGuard(6.0, torch.device("cpu")))


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Saves wait for it before they write anything."""
    opened, save = threading.Event(), saver.save

    def waiting(*args: object):
        assert opened.wait(30)
        return save(*args)

    monkeypatch.setattr(saver, "save", waiting)
    return opened


def test_what_changes_after_the_call_is_not_in_the_checkpoint(
    make_config, parts, tokenizer, run_dir, gate
):
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    work = Saver(run_dir, background=True)
    for step in (1, 2):
        parts.progress.step = step
        work.start(snapshot(make_config(), parts, tokenizer))
        assert work.ended() is None
        with torch.no_grad():
            for weight in parts.model.parameters():
                weight.add_(1)
        gate.set()
        folder = work.ended(waiting=True)
        assert folder == committed(run_dir)[-1]
        restore(folder, parts)
        now = parts.model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    work.close()


def test_parts_of_ranks_are_copied_with_their_places(make_config, parts, tokenizer, run_dir, gate):
    parts.place = lambda _, tensor: (
        cut(tensor, dim=0, index=0, parts=1, size=len(tensor)) if tensor.ndim else tensor
    )
    work = Saver(run_dir, background=True)
    work.start(snapshot(make_config(), parts, tokenizer))
    parts.model.norm.weight.data.zero_()
    gate.set()
    folder = work.ended(waiting=True)
    assert folder is not None
    parts.place = None
    restore(folder, parts)
    assert parts.model.norm.weight.min() == 1
    work.close()


def test_a_save_that_is_asked_to_wait_has_ended_when_it_returns(
    make_config, parts, tokenizer, run_dir
):
    work = Saver(run_dir, background=False)
    work.start(snapshot(make_config(), parts, tokenizer))
    assert work.ended() == committed(run_dir)[-1]
    assert work.ended() is None
    work.close()


def test_one_save_is_under_way_at_most(make_config, parts, tokenizer, run_dir, gate):
    work = Saver(run_dir, background=True)
    work.start(snapshot(make_config(), parts, tokenizer))
    with pytest.raises(AssertionError):
        work.start(snapshot(make_config(), parts, tokenizer))
    gate.set()
    work.close()


def test_saves_in_the_background_change_nothing_that_is_learnt_or_stored(
    make_config, fit, tmp_path
):
    for name in ("false", "true"):
        cfg = make_config(f"train.async_save={name}", "train.save_every=2")
        fit(cfg, tmp_path / name)
    assert records(tmp_path / "true") == records(tmp_path / "false")
    ends = [files(committed(tmp_path / name)[-1]) for name in ("true", "false")]
    same = {name for name, content in ends[0].items() if content == ends[1][name]}
    assert same == ends[0].keys() - {"config.toml", "MANIFEST.json"}


def test_a_save_that_fails_in_the_background_ends_the_run_at_its_next_step(
    make_config, fit, run_dir, monkeypatch
):
    save, steps = saver.save, []

    def full(run, taken, ranks):
        if taken.step == 4:
            raise OSError(28, "No space left on device")
        return save(run, taken, ranks)

    monkeypatch.setattr(saver, "save", full)
    cfg = make_config("train.async_save=true", "train.save_every=2", "train.steps=40")
    with pytest.raises(OSError, match="No space left"):
        fit(cfg, should_stop=lambda: bool(steps.append(0)))
    assert [path.name for path in committed(run_dir)] == ["step-00000002"]
    assert 4 <= len(steps) <= 6
    monkeypatch.setattr(saver, "save", save)
    assert fit(cfg).reason == "done"


def test_weights_are_copied_into_the_same_memory_every_time(
    make_config, parts, tokenizer, run_dir, gate
):
    """Allocating costs more than copying: the pause of the second save is a copy alone."""
    gate.set()
    work, places = Saver(run_dir, background=True), []
    for step in (1, 2):
        parts.progress.step = step
        taken = snapshot(make_config(), parts, tokenizer)
        places.append([t.data_ptr() for t in work._stable(taken).model.values()])
    assert places[0] == places[1]
    assert set(places[0]).isdisjoint(t.data_ptr() for t in parts.model.state_dict().values())
    work.close()
