"""What guards a run folder: the lock, the disk, whose it is."""

import shutil
from collections import namedtuple

import pytest

from fathom.train.folder import check_disk, check_folder, locked

Usage = namedtuple("Usage", "total used free")


def test_a_second_run_in_the_folder_is_refused_while_the_first_lasts(run_dir):
    with locked(run_dir):
        (run_dir / "config.toml").touch()
        with pytest.raises(ValueError, match="another process is training in"), locked(run_dir):
            pass
    with locked(run_dir):
        pass


def test_a_refused_run_leaves_no_folder_behind(run_dir):
    with pytest.raises(KeyError), locked(run_dir):
        raise KeyError
    assert not run_dir.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_results_without_a_config_are_not_ours_to_go_on_with(run_dir):
    run_dir.mkdir()
    (run_dir / "notes.txt").touch()
    check_folder(run_dir)
    (run_dir / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl but no config\.toml"):
        check_folder(run_dir)


@pytest.mark.parametrize(("free", "warns"), [(1000, False), (250, True), (120, True)])
def test_too_little_room_is_said_before_the_start(tmp_path, monkeypatch, free, warns):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2000, 0, free))
    warning = check_disk(tmp_path, needed=100, keep=2)
    assert (warning is not None) == warns
    assert warning is None or "train.keep=2" in warning


def test_no_room_for_one_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2000, 0, 90))
    with pytest.raises(OSError, match="make room"):
        check_disk(tmp_path, needed=100, keep=2)
