"""The same runs on several GPUs, through NCCL (make test-gpu on a machine that has them)."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.data.dataset import Dataset
from fathom.parallel.launch import free_port
from fathom.train.config import RunConfig
from layouts import LAYOUTS, follow

pytestmark = pytest.mark.multi_gpu
ON_GPUS = ["train.device=cuda", "train.save_every=20"]


def rank_of(rank: int, port: int, cfg: RunConfig, out: Path, dataset: Dataset) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(cfg.parallel.world), "MASTER_PORT": str(port)}
    follow(cfg, out, dataset)


@pytest.fixture
def train_on_gpus(dataset) -> Callable[[RunConfig, Path], torch.Tensor]:
    """In float64, in processes that are forked before CUDA is touched; the losses of each step."""

    def run(cfg: RunConfig, out: Path) -> torch.Tensor:
        fork, port = multiprocessing.get_context("fork"), free_port()
        ranks = [
            fork.Process(target=rank_of, args=(rank, port, cfg, out, dataset))
            for rank in range(cfg.parallel.world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * cfg.parallel.world
        return torch.tensor(json.loads((out / "told.json").read_text()), dtype=torch.float64)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_on_gpus_are_those_of_one(layout, make_config, train_on_gpus, tmp_path):
    cfg = make_config(*ON_GPUS, *LAYOUTS[layout])
    if cfg.parallel.world > torch.cuda.device_count():
        pytest.skip(f"needs {cfg.parallel.world} GPUs")
    want = train_on_gpus(make_config(*ON_GPUS), tmp_path / "alone")
    got = train_on_gpus(cfg, tmp_path / layout)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
