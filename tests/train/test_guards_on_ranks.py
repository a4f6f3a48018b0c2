"""Guards on several ranks: what one of them meets, all act on alike."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import distributed as dist

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.convert.run_folder import committed
from fathom.data.dataset import Dataset
from fathom.model import Losses
from fathom.train import guards
from fathom.train.config import RunConfig
from fathom.train.loop import train
from fathom.train.step import Learner
from ranks import on_ranks
from runs import files, records

Spoil = Callable[[Learner, Losses], Losses]
LAYOUTS = {"dp2": ["parallel.dp=2"], "ep2": ["parallel.ep=2", "parallel.shard=2"]}


def spike(learner: Learner, losses: Losses) -> Losses:
    """The last rank's rows 48 to 63 of the stream, four a step, have a hundredfold loss."""
    last = learner.loader.state()["row"] - 1
    return replace(losses, total=losses.total * 100) if 48 <= last < 64 else losses


def not_a_number(learner: Learner, losses: Losses) -> Losses:
    """The last rank's gradient of one weight is infinite in the third step."""
    if learner.progress.step == 2:
        weight = learner.model.norm.weight
        handle = weight.register_hook(lambda grad: handle.remove() or grad * float("inf"))
    return losses


def run(cfg: RunConfig, out: Path, dataset: Dataset, spoil: Spoil, stops: tuple[int, ...]) -> None:
    """Train on this rank, stopped after so many steps again and again, and then to the end."""
    guards.WINDOW = 8  # in a forked process, for itself
    losses = Learner.losses

    def spoilt(self: Learner, *args: object, **more: object) -> Losses:
        found = losses(self, *args, **more)
        return spoil(self, found) if dist.get_rank() == dist.get_world_size() - 1 else found

    Learner.losses = spoilt
    for stop in (*stops, None):
        calls = iter(range(1, 10**6))
        train(
            cfg,
            out,
            dataset=dataset,
            should_stop=lambda calls=calls, stop=stop: next(calls) == stop,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spikes_of_one_rank_send_all_back_and_stops_around_it_change_no_bit(
    make_config, dataset, tmp_path, layout
):
    cfg = make_config("train.steps=20", "train.save_every=4", *LAYOUTS[layout])
    for name, stops in (("whole", ()), ("parts", (13, 4))):
        assert on_ranks(2, run, cfg, tmp_path / name, dataset, spike, stops) == ["", ""]
    assert [line["step"] for line in records(tmp_path / "whole")] == list(range(1, 21))
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    ends = [committed(tmp_path / name)[-1] for name in ("parts", "whole")]
    assert files(ends[0]) == files(ends[1])
    state = json.loads((ends[0] / "state.json").read_text())
    assert state["guard"]["rollbacks"] == 1
    assert state["loader"]["row"] == (17 + 8) * 4  # back from step 17 to 12, with what came after


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_one_rank_that_is_not_finite_changes_nothing_on_any(
    make_config, dataset, tmp_path, layout
):
    cfg = make_config("train.steps=3", "train.save_every=1", *LAYOUTS[layout])
    assert on_ranks(2, run, cfg, tmp_path / "run", dataset, not_a_number, ()) == ["", ""]
    before, after = committed(tmp_path / "run")
    changed = {name for name, content in files(before).items() if content != files(after)[name]}
    assert changed == {"state.json", "MANIFEST.json"}
    assert [line.get("skipped") for line in records(tmp_path / "run")] == [None, None, True]
