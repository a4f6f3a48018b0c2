"""What ``fathom runs`` knows of a folder."""

from fathom.convert.run_folder import committed
from fathom.train.folder import locked
from fathom.train.listing import list_runs


def test_a_run_is_done_stopped_or_running(make_config, fit, tmp_path):
    fit(make_config(), tmp_path / "a" / "done")
    fit(make_config(), tmp_path / "a" / "stopped", stop_at=4)
    found = {run["run"].rpartition("/")[2]: run for run in list_runs(tmp_path)}
    assert found["done"]["state"] == "done"
    assert found["done"]["tokens"] == 6 * 128
    wanted = {"state": "stopped", "step": 4, "steps": 6, "checkpoint": 4, "whole": True}
    assert found["stopped"].items() >= wanted.items()
    with locked(tmp_path / "a" / "stopped"):
        assert [run["state"] for run in list_runs(tmp_path / "a" / "stopped")] == ["running"]


def test_a_damaged_newest_checkpoint_is_told(make_config, fit, run_dir):
    fit(make_config())
    (committed(run_dir)[-1] / "state.json").write_text("{}")
    assert list_runs(run_dir)[0]["whole"] is False


def test_a_folder_without_config_or_checkpoint_is_listed_as_far_as_it_goes(run_dir):
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("")
    (found,) = list_runs(run_dir)
    assert (found["step"], found["steps"], found["checkpoint"], found["whole"]) == (None,) * 4
    assert list_runs(run_dir / "nothing") == []
