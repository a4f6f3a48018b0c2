"""While a ladder runs, people see what is done, what was found so far, and how long it takes."""

import io
from pathlib import Path

import pytest

from fathom.ladder.plan import plan
from fathom.ladder.watch import Lines, Screen, reporter, share_done
from fathom.ladder.work import TrainTask


@pytest.fixture
def study(make_study):
    return make_study()


@pytest.fixture
def task(study, tmp_path):
    """``task("mqa", 2)``: a run that is to be trained."""
    planned = {p.arm.name: p for p in plan(study)}

    def make(arm: str, seed: int) -> TrainTask:
        cfg = planned[arm].run_config(seed, 0.1)
        return TrainTask(arm=arm, cfg=cfg, folder=tmp_path / arm / str(seed), key="k")

    return make


def result(bpb: float) -> dict:
    return {"val_bpb": bpb, "failed": None}


def test_a_pipe_gets_the_plan_and_one_line_per_run(study, task):
    stream = io.StringIO()
    told = reporter(stream)
    assert type(told) is Lines
    told.plan(study, plan(study), {"mha": 75.0})
    told.stage("training", 300.0)
    for arm, seed, bpb in (("mha", 1, 2.0), ("mqa", 1, 2.25), ("mqa", 2, 3.0)):
        told.started(task(arm, seed))
        told.finished(task(arm, seed), result(bpb))
    told.finished(task("moe", 1), {"failed": "not finite"})
    told.finished(task("mqa", 9), result(9.0))
    text = stream.getvalue()
    assert "same 512 tokens" in text
    assert "1m 15s" in text
    assert "training; about 5m 00s left" in text
    assert "mha seed 1 lr 0.1: 2.0000 bits per byte; about" in text
    assert "mqa seed 1 lr 0.1: 2.2500 bits per byte (+0.2500 against mha so far)" in text
    assert "mqa seed 2 lr 0.1: 3.0000 bits per byte (+0.2500 against mha so far)" in text
    assert "moe seed 1 lr 0.1 failed: not finite" in text
    assert "mqa seed 9 lr 0.1: 9.0000 bits per byte; about" in text  # a sweep's: no difference


def test_a_terminal_gets_a_table_of_arms_and_seeds(study, task):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    told = reporter(Terminal())
    assert isinstance(told, Screen)
    told.plan(study, plan(study), {})
    told.stage("training", 60.0)
    told.finished(task("mha", 1), result(2.0))
    told.started(task("mqa", 1))
    told.close()
    cells = [list(column.cells) for column in told.draw().columns]
    assert cells[0] == ["mha", "mqa", "moe"]
    assert cells[1] == ["2.0000", "0%", ""]
    assert cells[4] == ["2.0000", "", ""]


def test_the_end_shows_losses_verdicts_failures_and_anchors():
    verdict = {"sentence": "worse: by 0.5 bits per byte than mha"}
    results = {
        "study": "micro",
        "arms": [
            {"name": "mha", "val_bpb": {"mean": 2.0}, "verdict": None, "failed": None},
            {"name": "mqa", "val_bpb": {"mean": 2.5}, "verdict": verdict, "failed": None},
            {"name": "moe", "val_bpb": {"mean": None}, "verdict": None, "failed": "seed 1: killed"},
        ],
        "anchors": {"xz": {"mean": 2.75}},
    }
    stream = io.StringIO()
    Lines(stream).results(results)
    rows = {line.split()[0]: line for line in stream.getvalue().splitlines() if line.split()}
    assert "2.0000" in rows["mha"]
    assert "2.5000" in rows["mqa"]
    assert "worse: by 0.5" in rows["mqa"]
    assert "failed: seed 1: killed" in rows["moe"]
    assert "2.7500" in rows["xz"]


@pytest.mark.parametrize(
    ("content", "share"),
    [
        ("", 0.0),
        ('{"step": 1}\n{"step": 3}\n', 0.75),
        ('{"step": 1}\n{"step": 2}\n{"ste', 0.5),
        ("x" * 70_000 + '\n{"step": 4}\n', 1.0),
        ("torn", 0.0),
    ],
    ids=["empty", "whole", "being-written", "long", "nothing-readable"],
)
def test_progress_is_read_from_the_last_whole_line(task, content, share):
    run = task("mha", 1)
    assert share_done(run) == 0.0
    run.folder.mkdir(parents=True)
    Path(run.folder / "metrics.jsonl").write_text(content)
    assert share_done(run) == share
