"""What the ladder's tasks measure: losses by document, curves, probes, speed and memory."""

import json
import math
import sys
import tempfile

import pytest
import torch

from fathom.ladder.folder import Folder
from fathom.ladder.plan import plan
from fathom.ladder.task import read_object
from fathom.ladder.work import (
    CURVE_POINTS,
    PeakMemory,
    ProbeTask,
    SpeedTask,
    learning_curve,
    only_steps,
    threads,
)

CPU = torch.device("cpu")


@pytest.fixture
def cfg(make_study):
    return plan(make_study())[0].run_config(1, 0.1)


def test_a_result_has_the_sums_of_every_held_out_document(finished_ladder):
    result = read_object(Folder(finished_ladder).run("mha", 1) / "result.json")
    assert result is not None
    for domain, bpb in result["by_domain"].items():
        sums = result["documents"][domain]
        assert len(sums["nats"]) == len(sums["units"]) == 5
        assert sum(sums["nats"]) / math.log(2) / sum(sums["units"]) == pytest.approx(bpb)
    assert result["documents"].keys() == {"prose", "code", "image"}
    assert result["val_bpb"] == pytest.approx(sum(result["by_domain"].values()) / 2)


def test_a_curve_has_every_evaluation_and_the_training_loss_in_equal_stretches(tmp_path):
    steps = [{"step": i, "tokens": 10 * i, "bpb": float(i)} for i in range(1, 2 * CURVE_POINTS + 4)]
    steps[3]["bpb"] = None  # a step whose loss was not finite
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (tmp_path / "eval.jsonl").write_text('{"step": 9, "tokens": 90, "val_bpb": 2.5}\n')
    curve = learning_curve(tmp_path)
    assert (curve["tokens"], curve["bpb"]) == ([90], [2.5])
    assert curve["train_tokens"][:2] == [30, 70]  # three steps a point, the fourth left out
    assert curve["train_bpb"][:2] == [2.0, 6.0]
    assert curve["train_tokens"][-1] == steps[-1]["tokens"]
    assert len(curve["train_bpb"]) <= CURVE_POINTS


def test_a_folder_without_records_has_an_empty_curve(tmp_path):
    assert learning_curve(tmp_path) == {
        "tokens": [],
        "bpb": [],
        "train_tokens": [],
        "train_bpb": [],
    }


def test_a_probe_that_fails_says_so_and_the_others_go_on(finished_ladder, cfg, monkeypatch):
    from fathom.ladder import work
    from fathom.probes import PROBES, Probe

    def fail(model, dataset, context):
        raise RuntimeError("no such head")

    monkeypatch.setattr(work, "PROBES", {**PROBES, "broken": Probe("fails", fail)})
    folder = Folder(finished_ladder).run("mha", 1)
    names = ("broken", "position")
    task = ProbeTask(
        arm="mha", cfg=cfg, folder=folder, file=folder / "x", key="k", probes=names, threads=1
    )
    found = task.run()["probes"]
    assert found["broken"] == {"failed": "RuntimeError: no such head"}
    assert found["position"]["place"][0] == 0


def test_speed_is_measured_in_a_folder_that_is_gone_afterwards(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = SpeedTask(arm="mha", cfg=only_steps(cfg, 2), file=tmp_path / "x", key="k", threads=1)
    result = task.run()
    assert result["tokens_per_second"] * result["step_seconds"] == pytest.approx(128)
    assert result["threads"] == 1
    assert list(tmp_path.iterdir()) == []


def test_timed_steps_are_those_of_the_run_and_nothing_else(cfg, make_study):
    ramp = ("train.ramp_from_tokens=32", "train.ramp_steps=3", "train.warmup_steps=2")
    ramped = plan(make_study("budget.value=1024", *ramp))[0].config
    timed = only_steps(ramped, 5)
    assert timed.train.steps == 6
    assert (timed.train.ramp_steps, timed.train.warmup_steps, timed.train.eval_every) == (0, 0, 0)
    assert timed.model == ramped.model
    assert timed.train.tokens_per_step == ramped.train.tokens_per_step


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_peak_memory_is_what_was_used_since_and_not_before():
    megabytes = torch.ones(64, 2**18)  # 64 MiB
    before = PeakMemory(CPU)
    assert before.bytes() < 16 * 2**20
    more = torch.ones(32, 2**18)
    assert 30 * 2**20 < before.bytes() < 48 * 2**20
    del megabytes, more
    assert PeakMemory(CPU).bytes() < 16 * 2**20


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
