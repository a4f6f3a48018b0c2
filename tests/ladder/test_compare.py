"""Runs that exist are judged as a ladder's arms are: by their seeds, and by the documents."""

import json
import shutil
from pathlib import Path

import pytest

from fathom.ladder.compare import compare_runs
from fathom.ladder.folder import Folder
from fathom.settings import ConfigError


@pytest.fixture
def run(finished_ladder):
    return lambda arm, seed: Folder(finished_ladder).run(arm, seed)


def recorded(finished_ladder: Path, arm: str) -> dict:
    results = json.loads((finished_ladder / "results.json").read_text())
    return next(item for item in results["arms"] if item["name"] == arm)


def test_three_seeds_each_give_the_ladders_own_figures(finished_ladder, run):
    paths = [run(arm, seed) for seed in (3, 1, 2) for arm in ("mha", "moe")]
    first, second = compare_runs(paths, margin=0.02)["arms"]
    ladder = recorded(finished_ladder, "moe")
    assert (first["parent"], first["verdict"]) == (None, None)
    assert second["parent"] == first["name"] == run("mha", 3).as_posix()
    assert second["val_bpb"] == ladder["val_bpb"]
    assert second["verdict"]["delta_bpb"] == ladder["verdict"]["delta_bpb"]
    assert second["verdict"]["evaluation_interval"] == tuple(
        ladder["verdict"]["evaluation_interval"]
    )
    assert second["differs"] == ladder["differs"]


def test_one_run_each_is_unsure_but_shows_what_the_documents_say(run):
    _, second = compare_runs([run("mha", 1), run("mqa", 1)])["arms"]
    assert second["verdict"]["verdict"] == "unsure"
    low, high = second["verdict"]["evaluation_interval"]
    assert low <= second["verdict"]["delta_bpb"] <= high


def test_seeds_that_do_not_meet_have_no_difference(run):
    _, second = compare_runs([run("mha", 1), run("mqa", 2)])["arms"]
    assert second["verdict"]["n"] == 0
    assert second["verdict"]["delta_bpb"] is None


def test_a_run_without_a_ladder_is_measured_now(run, tmp_path):
    plain = Path(shutil.copytree(run("mqa", 1), tmp_path / "plain"))
    (plain / "result.json").unlink()
    ours = compare_runs([run("mha", 1), plain])["arms"][1]
    theirs = compare_runs([run("mha", 1), run("mqa", 1)])["arms"][1]
    assert ours["val_bpb"] == theirs["val_bpb"]
    assert not (plain / "result.json").exists()


def test_runs_of_one_config_are_no_comparison(run):
    with pytest.raises(ConfigError, match=r"two configs or more, got 2 of 1"):
        compare_runs([run("mha", 1), run("mha", 2)])


def test_one_config_with_one_seed_twice_is_refused(run, tmp_path):
    twin = Path(shutil.copytree(run("mha", 1), tmp_path / "twin"))
    with pytest.raises(ConfigError, match=r"one config with one seed, 1"):
        compare_runs([run("mha", 1), twin, run("mqa", 1)])


def test_runs_on_other_text_are_refused(run, tmp_path):
    other = Path(shutil.copytree(run("mqa", 1), tmp_path / "other"))
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(config.replace("seq_len = 32", "seq_len = 64", 1))
    with pytest.raises(ConfigError, match=r"not measured alike: .* 64 here, .* 32 in the first"):
        compare_runs([run("mha", 1), other])
