"""The same runs and layers on several GPUs, through NCCL (make test-gpu on a machine with them)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fathom.train.config import RunConfig
from gpus import check_layer, follow_in, on_gpus
from layouts import LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]
ON_GPUS = ["train.device=cuda", "train.save_every=20"]


@pytest.fixture
def train_on_gpus(dataset) -> Callable[[RunConfig, Path], torch.Tensor]:
    """In float64; the losses of each step."""

    def run(cfg: RunConfig, out: Path) -> torch.Tensor:
        on_gpus(cfg.parallel.world, follow_in, cfg, out, dataset.folder)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_layer_over_two_gpus_is_as_exact_as_on_one_and_fp8_loses_a_few_percent():
    on_gpus(2, check_layer)
