"""Ranks that are started here end together, with the exit code that says why."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.parallel import launch

EXAMPLES = Path(__file__).parents[2] / "examples"


def ranks(*programs: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-S", "-c", program]) for program in programs]


@pytest.mark.parametrize(
    ("codes", "code"),
    [((0, 0), 0), ((75, 75), 75), ((0, 3), 3), ((2, 3), 2), ((75, 0), 75)],
)
def test_the_first_rank_that_failed_says_how_the_run_ended(codes, code):
    assert launch.wait_for(ranks(*(f"raise SystemExit({each})" for each in codes))) == code


def test_a_rank_that_is_killed_is_named_and_the_others_get_their_time(capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.3)
    found = ranks("import time; time.sleep(60)", "import os; os.kill(os.getpid(), 9)")
    begun = time.monotonic()
    assert launch.wait_for(found) == 1
    assert time.monotonic() - begun < 30
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_the_ranks_are_told_who_they_are(monkeypatch, tmp_path):
    class Rank:
        returncode = 0
        started: list[tuple[list[str], dict[str, str]]] = []  # noqa: RUF012

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self.started.append((command, env))

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Rank)
    config = "configs/tiny.toml"
    asked = f"train {config} --nproc 2 --out {tmp_path} parallel.ep=2 train.steps=9"
    assert main(shlex.split(asked)) == 0
    assert [env["RANK"] for _, env in Rank.started] == ["0", "1"]
    assert {env["WORLD_SIZE"] for _, env in Rank.started} == {"2"}
    assert len({env["MASTER_PORT"] for _, env in Rank.started}) == 1
    words = ["train", config, "--out", str(tmp_path)]
    keys = ["--set", "parallel.ep=2", "--set", "train.steps=9"]
    assert Rank.started[0][0] == [sys.executable, "-m", "fathom", *words, *keys]


def test_another_number_of_ranks_than_places_is_refused(capsys):
    assert main(["train", "configs/tiny.toml", "--nproc", "2", "parallel.ep=4"]) == 2
    assert "1 * 4 = 4 processes and 2 were started" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_train_evaluate_sample_save_and_go_on_as_one(tmp_path):
    run = [sys.executable, "-m", "fathom", "train", "configs/tiny.toml", "--out", str(tmp_path)]
    keys = ["train.eval_every=2", "train.sample_every=2", "train.save_every=2"]
    keys += ["train.warmup_steps=0"]
    two = [*run, "--nproc", "2", "parallel.ep=2", "train.steps=2", *keys]
    done = subprocess.run(two, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 2 steps") == 1  # rank 0 speaks alone
    done = subprocess.run([*run, "train.steps=3", *keys], capture_output=True, text=True)
    assert "going on after step 2" in done.stderr


@pytest.mark.parametrize("name", ["slurm.sh", "pytorchjob.yaml"])
def test_the_launch_examples_name_a_layout_for_as_many_ranks_as_they_start(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    keys = [word.strip(",[]\\") for word in text.split() if word.strip("[").startswith("parallel.")]
    assert keys == ["parallel.dp=4", "parallel.ep=8", "parallel.shard=32"]
    assert "fathom" in text
    if name.endswith(".sh"):
        subprocess.run(["bash", "-n", EXAMPLES / name], check=True)
