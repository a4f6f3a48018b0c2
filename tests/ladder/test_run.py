"""A ladder trains what has no result yet, whatever stopped it, and lets no arm stop another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.ladder.folder import Folder
from fathom.ladder.run import run_ladder, with_added_seeds
from fathom.ladder.watch import Reporter
from fathom.settings import ConfigError, to_toml

TIMINGS = {"train_tokens_per_second", "peak_memory_bytes", "train_seconds"}
ABOUT = {"commands", "env"}  # folder and machine


class Notes(Reporter):
    """Remembers which runs began, and what was said; may stop the ladder at the n-th run."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.begun: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.stop_at = stop_at

    def started(self, task) -> None:
        self.begun.append((task.arm, task.cfg.train.seed))
        if len(self.begun) == self.stop_at:
            raise KeyboardInterrupt

    def notice(self, sentence: str) -> None:
        self.said.append(sentence)


def figures(out: Path) -> dict:
    """``results.json``; timings, folder and machine apart."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in TIMINGS | ABOUT}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads((out / "results.json").read_text()))


def arms(out: Path) -> dict[str, dict]:
    return {arm["name"]: arm for arm in json.loads((out / "results.json").read_text())["arms"]}


@pytest.fixture
def again(finished_ladder, tmp_path) -> Path:
    """A copy of the finished ladder, to be changed."""
    return Path(shutil.copytree(finished_ladder, tmp_path / "micro"))


def probed(make_study, *overrides: str):
    return make_study('probes=["position", "routing"]', *overrides)


def test_a_finished_ladder_leaves_figures_report_and_a_way_to_repeat_it(finished_ladder):
    found = arms(finished_ladder)
    assert list(found) == ["mha", "mqa", "moe"]
    for arm in found.values():
        assert arm["failed"] is None
        assert arm["val_bpb"]["n"] == 3
        assert arm["train_tokens_per_second"] > 0
        assert [curve["tokens"] for curve in arm["curves"]] == [[256, 512]] * 3
        assert arm["probes"]["position"]
    assert found["moe"]["probes"]["routing"]["load"]
    assert found["mha"]["probes"]["routing"] == {}
    assert "balance" not in found["mha"]["probes"]
    balance = found["moe"]["probes"]["balance"]
    assert balance["tokens"] == [128, 256, 384, 512]
    assert all(0 <= violation < 4 for violation in balance["max_violation"])
    assert found["mqa"]["cache_bytes_per_token"] < found["mha"]["cache_bytes_per_token"]
    results = figures(finished_ladder)
    assert results["anchors"].keys() == {"xz", "xz_after_training", "order2"}
    assert "not tuned" in results["lr_note"]
    assert results["data"]["domains"]["image"]["kind"] == "symbols"
    assert str(finished_ladder.parent) not in json.dumps(results["data"])
    assert (finished_ladder / "report.html").stat().st_size > 1000


def test_a_finished_ladder_run_again_trains_nothing_and_says_the_same(make_study, again):
    before, notes = figures(again), Notes()
    assert run_ladder(probed(make_study), again, jobs=0, reporter=notes).exit_code == 0
    assert notes.begun == []
    assert figures(again) == before


def test_a_stopped_ladder_goes_on_and_ends_with_the_same_figures(
    make_study, finished_ladder, tmp_path
):
    out = tmp_path / "micro"
    first, second = Notes(stop_at=5), Notes()
    stopped = run_ladder(probed(make_study), out, jobs=0, reporter=first)
    assert stopped.exit_code == 75
    assert "fathom ladder" in stopped.message
    assert not (out / "results.json").exists()
    assert run_ladder(probed(make_study), out, jobs=0, reporter=second).exit_code == 0
    assert len(second.begun) == 9 - 4
    assert not set(second.begun) & set(first.begun[:4])
    assert figures(out) == figures(finished_ladder)


def test_a_run_stopped_half_way_goes_on_from_its_checkpoint(make_study, again):
    """As after a kill: no result yet, and a checkpoint that is not the last."""
    before, notes = figures(again), Notes()
    run = Folder(again).run("moe", 2)
    (run / "result.json").unlink()
    run_ladder(probed(make_study), again, jobs=0, reporter=notes)
    assert notes.begun == [("moe", 2)]
    assert notes.said == []
    assert figures(again) == before


def test_a_changed_arm_is_trained_again_and_its_old_runs_are_kept_apart(make_study, again):
    before, notes = arms(again), Notes()
    change = 'arms.1.change=["model.groups.*.attention.n_kv_heads=1", "model.norm_eps=1e-4"]'
    run_ladder(probed(make_study, change), again, jobs=0, reporter=notes)
    assert sorted(notes.begun) == [("mqa", 1), ("mqa", 2), ("mqa", 3)]
    assert len(list((again / "replaced").iterdir())) == 3
    assert all("another config" in sentence for sentence in notes.said)
    assert arms(again)["mqa"]["val_bpb"] != before["mqa"]["val_bpb"]
    assert arms(again)["moe"]["val_bpb"] == before["moe"]["val_bpb"]


def test_a_diverging_and_a_breaking_arm_become_rows_and_the_others_go_on(
    make_study, tmp_path, monkeypatch
):
    from fathom.ladder import work

    train = work.train

    def break_mqa(cfg, folder, **more):
        if "mqa" in folder.parts and cfg.train.seed == 2:
            raise MemoryError("out of memory")
        return train(cfg, folder, **more)

    monkeypatch.setattr(work, "train", break_mqa)
    diverge = 'arms.2.change=["model.groups.*.ffn.inter_dim=40", "train.lr=1e30"]'
    study = make_study(diverge, "train.eval_every=0", "seeds=[1, 2]")
    assert run_ladder(study, tmp_path / "out", jobs=0).exit_code == 0
    found = arms(tmp_path / "out")
    assert found["mqa"]["failed"] == "seed 2: MemoryError: out of memory"
    assert found["mqa"]["val_bpb"]["mean"] is None
    assert "not finite" in found["moe"]["failed"]
    assert found["mha"]["failed"] is None
    monkeypatch.undo()
    notes = Notes()
    assert run_ladder(study, tmp_path / "out", jobs=0, reporter=notes).exit_code == 0
    assert notes.begun == [("mqa", 2)]  # what diverged would diverge again
    assert arms(tmp_path / "out")["mqa"]["failed"] is None


def test_a_ladder_without_any_result_has_failed(make_study, tmp_path):
    study = make_study("train.lr=1e30", "seeds=[1]", "train.eval_every=0", 'arms=[{name = "mha"}]')
    result = run_ladder(study, tmp_path / "out", jobs=0)
    assert (result.reason, result.exit_code) == ("failed", 1)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["learned"]["below"] is None


def test_only_and_add_seeds_extend_a_finished_study(make_study, again):
    before, notes = arms(again), Notes()
    study = probed(make_study)
    run_ladder(study, again, only=["mqa"], add_seeds=1, jobs=0, reporter=notes)
    assert notes.begun == [("mqa", 4)]
    found = arms(again)
    assert [seed["seed"] for seed in found["mqa"]["seeds"]] == [1, 2, 3, 4]
    assert found["mqa"]["seeds"][:3] == before["mqa"]["seeds"]
    assert "--only named other arms" in found["mha"]["failed"]
    run_ladder(study, again, jobs=0, reporter=notes)  # the folder remembers the added seed
    assert sorted(notes.begun[1:]) == [("mha", 4), ("moe", 4)]
    assert arms(again)["mqa"]["verdict"]["n"] == 4


def test_asking_twice_for_added_seeds_adds_them_once(make_study, tmp_path):
    folder, study = Folder(tmp_path), make_study("seeds=[2, 5]")
    longer = with_added_seeds(study, folder, 2)
    assert longer.seeds == (2, 5, 6, 7)
    folder.study.write_text(to_toml(longer))
    assert with_added_seeds(study, folder, 2).seeds == (2, 5, 6, 7)
    assert with_added_seeds(study, folder, 0).seeds == (2, 5, 6, 7)
    with pytest.raises(ConfigError, match="--add-seeds must be at least 0"):
        with_added_seeds(study, folder, -1)


def test_a_dry_run_plans_and_touches_nothing(make_study, tmp_path):
    planned = []

    class Plan(Reporter):
        def plan(self, study, arms, seconds):
            planned.append({p.arm.name: seconds[p.arm.name] for p in arms})

    result = run_ladder(make_study(), tmp_path / "out", dry_run=True, jobs=0, reporter=Plan())
    assert result.exit_code == 0
    assert all(seconds > 0 for seconds in planned[0].values())
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_gives_every_arm_its_own_rate_and_is_not_part_of_the_verdict(make_study, tmp_path):
    study = make_study("lr.sweep=[0.001, 0.003, 0.01, 0.03, 0.1]", "seeds=[1]")
    notes = Notes()
    run_ladder(study, tmp_path / "out", only=["mha", "mqa"], jobs=0, reporter=notes)
    assert notes.begun.count(("mqa", 2)) == 5  # seed 2 is no seed of the study
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    swept = results["lr"]["sweep"]
    assert swept.keys() == {"mha", "mqa"}
    assert [lr for lr, _ in swept["mqa"]["points"]] == [0.001, 0.003, 0.01, 0.03, 0.1]
    assert arms(tmp_path / "out")["mqa"]["lr"] == results["lr"]["rates"]["mqa"]
    assert "sweep of 5 rates with seed 2" in results["lr_note"]


def test_a_swept_rate_is_known_when_other_arms_are_trained_later(make_study, tmp_path):
    study, out = make_study("lr.sweep=[0.001, 0.003, 0.01, 0.03, 0.1]", "seeds=[1]"), tmp_path / "o"
    run_ladder(study, out, only=["mha"], jobs=0)
    before = arms(out)["mha"]
    run_ladder(study, out, only=["mqa"], jobs=0)
    assert arms(out)["mha"]["lr"] == before["lr"]
    assert arms(out)["mha"]["val_bpb"] == before["val_bpb"]


def test_a_sweep_may_take_a_share_of_the_steps(make_study, tmp_path):
    study = make_study(
        "lr.sweep=[0.001, 0.003, 0.01, 0.03, 0.1]", "lr.sweep_share=0.5", "seeds=[1]"
    )
    run_ladder(study, tmp_path / "out", only=["mha"], jobs=0)
    swept = json.loads((tmp_path / "out/sweep/mha/lr-0.01/result.json").read_text())
    assert (swept["tokens"], arms(tmp_path / "out")["mha"]["seeds"][0]["tokens"]) == (256, 512)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "5 rates, 50% of the steps each, with seed 2" in results["lr_note"]


class Later(Notes):
    """Lets an hour pass when the n-th run begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        super().__init__()
        self.patch, self.at, self.now = monkeypatch, at, time.monotonic

    def started(self, task) -> None:
        super().started(task)
        if len(self.begun) == self.at:
            self.patch.setattr(time, "monotonic", lambda: self.now() + 3600)


def test_when_the_time_is_up_what_is_finished_is_reported_and_the_rest_goes_on_later(
    make_study, finished_ladder, tmp_path, monkeypatch
):
    out = tmp_path / "micro"
    with monkeypatch.context() as patch:
        first = Later(patch, at=4)
        result = run_ladder(probed(make_study), out, jobs=0, minutes=30, reporter=first)
    assert result.exit_code == 75
    assert "the time was up" in result.message
    assert len(first.begun) == 4
    (whole,) = [arm for arm, found in arms(out).items() if found["failed"] is None]
    assert arms(out)[whole]["probes"].keys() >= {"position", "routing"}
    (half,) = {arm for arm, _ in first.begun} - {whole}
    assert arms(out)[half]["failed"] == "seed 2, 3: not trained: the time was up"
    assert run_ladder(probed(make_study), out, jobs=0).exit_code == 0
    assert figures(out) == figures(finished_ladder)


def test_half_a_sweep_trains_no_arm(make_study, tmp_path, monkeypatch):
    study = make_study("lr.sweep=[0.001, 0.003, 0.01, 0.03, 0.1]", "seeds=[1]")
    with monkeypatch.context() as patch:
        late = Later(patch, at=7)
        run_ladder(study, tmp_path / "out", jobs=0, minutes=30, reporter=late)
    assert {seed for _, seed in late.begun} == {2}  # the sweep's
    whole = [arm for arm in ("mha", "mqa", "moe") if late.begun.count((arm, 2)) == 5]
    assert len(whole) == 1
    for arm, found in arms(tmp_path / "out").items():
        assert ("the time was up" if arm in whole else "sweep is not finished") in found["failed"]


def test_equal_time_gives_every_arm_steps_by_its_own_speed(make_study, tmp_path):
    study = make_study('budget.hold="wall_time"', "budget.value=0.3", "seeds=[1]")
    run_ladder(study, tmp_path / "out", jobs=0)
    found = arms(tmp_path / "out")
    assert all(arm["failed"] is None and arm["tokens"] >= 128 for arm in found.values())
    tokens = {name: arm["tokens"] for name, arm in found.items()}
    notes = Notes()
    run_ladder(study, tmp_path / "out", jobs=0, reporter=notes)
    assert notes.begun == []  # the measured steps are kept, so the plan is the same
    assert {name: arm["tokens"] for name, arm in arms(tmp_path / "out").items()} == tokens


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"only": ["mla"]}, "--only mla: the study's arms are mha, mqa, moe"),
        ({"study": 'probes=["telepathy"]'}, "no probe 'telepathy'; there are .*position"),
        ({"study": "arms.1.fit=none", "add_seeds": -1}, "--add-seeds must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(make_study, tmp_path, more, message):
    study = make_study(*([more.pop("study")] if "study" in more else []))
    with pytest.raises(ConfigError, match=message):
        run_ladder(study, tmp_path / "out", jobs=0, **more)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
from fathom.ladder.run import run_ladder
from fathom.ladder.study import load_study

if __name__ == "__main__":
    study = load_study(sys.argv[1])
    sys.exit(run_ladder(study, Path(sys.argv[2]), jobs=1).exit_code)
"""


def test_a_signal_stops_workers_cleanly_and_everything_can_go_on(make_study, tmp_path):
    """Ctrl-C in a terminal reaches parent and workers alike; the run in hand is saved."""
    study = make_study("budget.value=1e7", "seeds=[1]", 'arms=[{name = "mha"}]')
    (tmp_path / "study.toml").write_text(to_toml(study))
    (tmp_path / "ladder.py").write_text(SCRIPT)
    out = tmp_path / "out"
    command = [sys.executable, "ladder.py", "study.toml", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        metrics = Folder(out).run("mha", 1) / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert list((metrics.parent / "checkpoints").iterdir())
    assert not (metrics.parent / "result.json").exists()
