"""Two hosts, tried as two network namespaces with a cable between them: torchrun on each."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS, CABLE, ADDRESS = ("fathom-a", "fathom-b"), "cable", "10.203.0.{}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, ...]]:
    """The namespaces; each has one network card, and no other way to anywhere."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs ip and root")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ends = [host.replace("fathom", CABLE) for host in HOSTS]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (host, end) in enumerate(zip(HOSTS, ends, strict=True), start=1):
            ip("link", "set", end, "netns", host, "name", CABLE)
            ip("-n", host, "address", "add", ADDRESS.format(number) + "/24", "dev", CABLE)
            for link in ("lo", CABLE):
                ip("-n", host, "link", "set", link, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    else:
        yield HOSTS
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def start(host: str, rank: int, *run: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
    torchrun += [f"--master-addr={ADDRESS.format(1)}", "--master-port=29777", "-m"]
    command = ["ip", "netns", "exec", host, sys.executable, *torchrun, *run]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_two_hosts_train_as_one_process_and_the_second_is_silent(hosts, tmp_path):
    keys = ["train.steps=2", "train.eval_every=2", "train.warmup_steps=0"]
    run = ["fathom", "train", "configs/tiny.toml", "--out"]
    two = [
        start(host, rank, *run, str(tmp_path / "two"), "parallel.ep=2", *keys)
        for rank, host in enumerate(hosts)
    ]
    said = [process.communicate(timeout=200) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert "trained 2 steps" in said[0][0]
    assert said[1][0] == ""
    subprocess.run([sys.executable, "-m", *run, str(tmp_path / "one"), *keys], cwd=ROOT, check=True)
    bits = [
        json.loads((tmp_path / name / "eval.jsonl").read_text().splitlines()[-1])["val_bpb"]
        for name in ("one", "two")
    ]
    assert bits[1] == pytest.approx(bits[0], rel=1e-4)
