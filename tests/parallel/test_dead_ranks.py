"""A rank that dies, or stops, in any phase of a run is named by the other within 30 seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.parallel.launch import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from fathom.cli import main
from fathom.train.loop import Trainer
from fathom.train.step import Learner

def end(*_):
    os.kill(os.getpid(), int(sys.argv[2]))

if os.environ["RANK"] == "1":
    setattr(Learner if hasattr(Learner, sys.argv[1]) else Trainer, sys.argv[1], end)
sys.exit(main(sys.argv[3:]))
"""


def start(rank: int, port: int, *args: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", PROGRAM, *args]
    env = {**os.environ, **place, **address}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stops"])
@pytest.mark.parametrize("phase", ["load", "gradients", "evaluate", "save"])
def test_the_other_rank_names_it_and_ends(phase, how, tmp_path):
    keys = ["parallel.ep=2", "train.eval_every=2", "train.save_every=2", "train.steps=9"]
    run = ["train", "configs/tiny.toml", "--out", str(tmp_path), *keys]
    port = free_port()
    lives, dead = (start(rank, port, phase, str(int(how)), *run) for rank in (0, 1))
    try:
        while not ended(dead):
            time.sleep(0.1)
        since = time.monotonic()
        _, said = lives.communicate(timeout=40)
        assert time.monotonic() - since < 30
        assert lives.returncode == 1
        assert "rank 0: rank 1 was not heard of for 15 seconds; ending" in said
    finally:
        for process in (lives, dead):
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str]) -> bool:
    """Whether it has died, or is stopped."""
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state in "ZT"
