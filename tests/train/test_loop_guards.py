"""Guards at work in the loop: what must change nothing, what goes back, what stops a run."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fathom.convert.run_folder import committed, load_model
from fathom.model import Decoder
from fathom.settings import ConfigError
from fathom.train import guards
from fathom.train.loop import Trainer
from fathom.train.step import Learner
from runs import Notices, files, records

BAD = [math.nan, math.inf]


@pytest.fixture
def poison(monkeypatch) -> Callable[..., None]:
    """Make the loss, or one gradient, of some steps (from 0) not finite."""

    def install(*steps: int, gradient: bool = False) -> None:
        losses = Learner.losses

        def poisoned(self, batch, **more):
            result = losses(self, batch, **more)
            if self.progress.step in steps and not gradient:
                return replace(result, total=result.total * float("nan"))
            if self.progress.step in steps:
                weight = self.model.norm.weight
                handle = weight.register_hook(lambda grad: handle.remove() or grad * float("inf"))
            return result

        monkeypatch.setattr(Learner, "losses", poisoned)

    return install


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    make_config, fit, run_dir, poison, gradient
):
    poison(1, gradient=gradient)
    fit(make_config("train.steps=2", "train.save_every=1"))
    before, after = committed(run_dir)
    changed = {name for name, content in files(before).items() if content != files(after)[name]}
    assert changed == {"state.json", "MANIFEST.json"}  # no weight, bias or optimizer state
    lines = records(run_dir)
    assert lines[1]["skipped"] is True
    assert "skipped" not in lines[0]
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    state = json.loads((after / "state.json").read_text())
    assert (state["skipped"], state["skipped_in_all"]) == (1, 1)


def test_three_such_steps_in_a_row_stop_the_run(make_config, fit, run_dir, poison):
    poison(1, 3, 4, 5)
    result = fit(make_config("train.steps=20", "train.save_every=2"))
    assert (result.reason, result.exit_code) == ("guard", 4)
    assert 6 <= result.step <= 7  # found out at most one step late
    assert "train.lr" in result.message
    assert str(committed(run_dir)[-1]) in result.message
    assert all(tensor.isfinite().all() for tensor in load_model(run_dir)[0].state_dict().values())


def test_two_such_steps_in_a_row_do_not(make_config, fit, poison):
    poison(1, 2, 4, 5)
    assert fit(make_config("train.steps=8")).reason == "done"


# --- Twenty points at which a number may go bad ---


def spoil_weight(bad: float, name: str) -> Callable[[Decoder], Callable[[], None]]:
    """Its gradient has one bad number."""

    def install(model: Decoder) -> Callable[[], None]:
        def spoil(grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad.view(-1)[0] = bad
            return grad

        return model.get_parameter(name).register_hook(spoil).remove

    return install


def spoil_output(bad: float, name: str) -> Callable[[Decoder], Callable[[], None]]:
    """What a module gives in the forward has one bad number."""

    def install(model: Decoder) -> Callable[[], None]:
        def spoil(module: nn.Module, inputs: object, output: object) -> object:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, Tensor)
            mask = torch.zeros_like(tensor)
            mask.view(-1)[-1] = bad
            return (tensor + mask, *output[1:]) if isinstance(output, tuple) else tensor + mask

        return model.get_submodule(name).register_forward_hook(spoil).remove

    return install


WEIGHTS = ["embed.weight", "blocks.0.attention.wq.weight", "blocks.1.ffn.router.weight"]
WEIGHTS += ["blocks.1.ffn.experts.w_down", "mtp.0.eh_proj.weight"]
OUTPUTS = ["embed", "blocks.0.attention", "blocks.1", "norm", "mtp.0.block"]
POINTS = {
    f"{bad} in {where} {name}": spoil(bad, name)
    for bad in BAD
    for where, spoil, names in (
        ("the gradient of", spoil_weight, WEIGHTS),
        ("the output of", spoil_output, OUTPUTS),
    )
    for name in names
}


@pytest.fixture
def trainer(make_config, dataset, run_dir) -> Iterator[Callable[..., Trainer]]:
    """A trainer of a run, two steps on."""
    made = []

    def make(*overrides: str) -> Trainer:
        run_dir.mkdir()
        more = {"reporter": Notices(), "sample": None, "start": None}
        cpu = torch.device("cpu")
        made.append(Trainer(make_config(*overrides), run_dir, dataset, device=cpu, **more))
        made[0].step()
        made[0].step()
        return made[0]

    yield make
    made[0].close()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_number_at_any_of_twenty_points_changes_nothing_that_is_learnt(trainer, optimizer):
    loop = trainer(f"train.optimizer={optimizer}", "train.micro_batch_size=2")
    assert len(POINTS) == 20
    learner, parts = loop.learner, loop.learner.parts
    live = {**learner.model.state_dict(), **parts.optimizer.state()}
    live["window"] = learner.guard.window_2W
    for point, install in POINTS.items():
        before = {name: tensor.clone() for name, tensor in live.items()}
        undo = install(learner.model)
        loop.step()
        undo()
        assert all(torch.equal(live[n], t) or n == "window" for n, t in before.items()), point
        assert torch.equal(live["window"].nan_to_num(), before["window"].nan_to_num()), point
        loop.journal.flush()
        assert loop.progress.skipped_in_all == 1 + list(POINTS).index(point), point
    loop.step()
    loop.journal.flush()
    assert not torch.equal(live["embed.weight"], before["embed.weight"])
    assert loop.progress.skipped == 0


# --- Spikes ---


@pytest.fixture
def spiky(monkeypatch) -> Callable[..., None]:
    """Steps that read certain rows of the stream (from 0, four a step) have a hundredfold loss."""
    monkeypatch.setattr(guards, "WINDOW", 8)

    def install(rows: range) -> None:
        losses = Learner.losses

        def poisoned(self, batch, **more):
            result = losses(self, batch, **more)
            last = self.loader.state()["row"] - 1
            return replace(result, total=result.total * 100) if last in rows else result

        monkeypatch.setattr(Learner, "losses", poisoned)

    return install


def test_a_spike_changes_nothing_is_told_and_counted(make_config, fit, run_dir, spiky):
    spiky(range(36, 40))
    notices = Notices()
    fit(make_config("train.steps=10", "train.save_every=9"), reporter=notices)
    lines = records(run_dir)
    assert [(line["step"], line.get("spike")) for line in lines if line.get("skipped")] == [
        (10, True)
    ]
    assert len(notices.heard) == 1
    assert notices.heard[0].startswith("step 10 changed nothing, it spiked: loss ")
    before, after = committed(run_dir)
    changed = {name for name, content in files(before).items() if content != files(after)[name]}
    assert changed == {"state.json", "MANIFEST.json"}


def test_persistent_spikes_go_back_and_leave_their_data_out(make_config, fit, run_dir, spiky):
    """Steps 13 to 16 read bad rows: after 17 the run returns to 12, and reads on from row 68."""
    spiky(range(48, 64))
    cfg = make_config("train.steps=20", "train.save_every=4", "train.eval_every=4")
    notices = Notices()
    result = fit(cfg, reporter=notices)
    assert (result.reason, result.step, result.tokens) == ("done", 20, 20 * 128)
    lines = records(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert not any(line.get("skipped") for line in lines)
    assert "back from step 17 to 12" in notices.heard[-1]
    state = json.loads((committed(run_dir)[-1] / "state.json").read_text())
    assert state["loader"]["row"] == (17 + 8) * 4
    assert state["guard"]["rollbacks"] == 1


@pytest.mark.parametrize("stops", [(3, 13), (17, 1), (13, 1, 1)], ids=str)
def test_a_chain_of_stops_around_a_return_is_the_run_that_never_stopped(
    make_config, fit, tmp_path, spiky, stops
):
    spiky(range(48, 64))
    cfg = make_config("train.steps=20", "train.save_every=4")
    fit(cfg, tmp_path / "whole")
    for stop in (*stops, None):
        fit(cfg, tmp_path / "parts", stop_at=stop)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    ends = [committed(tmp_path / part)[-1] for part in ("parts", "whole")]
    assert files(ends[0]) == files(ends[1])


def test_a_run_that_spikes_whatever_it_reads_is_stopped(make_config, fit, run_dir, spiky):
    spiky(range(48, 10**6))
    result = fit(make_config("train.steps=60", "train.save_every=4"))
    assert (result.reason, result.exit_code) == ("guard", 4)
    assert "after 3 returns to an earlier checkpoint" in result.message
    assert "train.lr" in result.message


def test_without_a_checkpoint_to_go_back_to_persistent_spikes_stop_the_run(make_config, fit, spiky):
    spiky(range(48, 64))
    result = fit(make_config("train.steps=20"))
    assert result.reason == "guard"
    assert "nothing was saved" in result.message


# --- The rest ---


def test_a_step_computed_twice_with_other_bits_stops_the_run(make_config, fit, monkeypatch):
    gradients, calls = Learner.gradients, []

    def flipping(self, *args):
        sums = gradients(self, *args)
        calls.append(self.progress.step)
        if len(calls) == 5:  # steps 1, 2, 2, 3, 4, 4: the second time of none; of step 4 the first
            self.model.embed.weight.grad.view(torch.int32)[5, 5] ^= 1
        return sums

    monkeypatch.setattr(Learner, "gradients", flipping)
    cfg = make_config("train.deterministic=true", "train.repeat_every=2", "train.steps=12")
    result = fit(cfg)
    assert (result.reason, result.step) == ("guard", 5)
    assert "step 4, computed twice, gave other gradients" in result.message


def test_computing_steps_twice_changes_nothing_else(make_config, fit, tmp_path):
    for every in (0, 2):
        cfg = make_config("train.deterministic=true", f"train.repeat_every={every}")
        fit(cfg, tmp_path / str(every))
    assert records(tmp_path / "2") == records(tmp_path / "0")


def test_comparing_steps_needs_determinism(make_config):
    with pytest.raises(ConfigError, match=r"needs train\.deterministic=true"):
        make_config("train.repeat_every=2")


def test_dead_experts_are_named_by_layer(make_config, fit, monkeypatch):
    monkeypatch.setattr(guards, "PATIENCE", 3)
    notices = Notices()
    pinned = "model.groups.1.ffn.balance=[{kind='aux_loss_free', bias_update_speed=0}]"
    build = Learner.__init__

    def starved(self, *args, **more):
        build(self, *args, **more)
        self.model.state_dict()["blocks.1.ffn.router.expert_bias"][2] = -100

    monkeypatch.setattr(Learner, "__init__", starved)
    fit(make_config(pinned), reporter=notices)
    assert notices.heard[0].startswith("step 3: blocks.1.ffn: no token reached expert 2 in 3 steps")


@pytest.mark.parametrize("balance", ["aux_loss_free", "seq_aux_loss"])
def test_activation_checkpointing_routes_exact_ties_as_before_and_counts_once(
    make_config, fit, tmp_path, monkeypatch, balance
):
    build = Learner.__init__

    def tied(self, *args, **more):
        build(self, *args, **more)
        with torch.no_grad():
            for _, moe in self.model.moe_layers():
                moe.router.weight.zero_()

    monkeypatch.setattr(Learner, "__init__", tied)
    for name in ("false", "true"):
        cfg = make_config(
            f"train.activation_checkpointing={name}",
            f"model.groups.1.ffn.balance=[{{kind='{balance}'}}]",
            *("train.log_load=true", "train.micro_batch_size=2"),
        )
        fit(cfg, tmp_path / name)
    lines = records(tmp_path / "true")
    assert lines == records(tmp_path / "false")
    assert lines[0]["layers"][0]["load"] == [2.0, 2.0, 0.0, 0.0]  # the lowest ids win a tie
    ends = [load_model(tmp_path / name)[0].state_dict() for name in ("false", "true")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
