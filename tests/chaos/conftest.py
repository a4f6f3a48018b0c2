"""A very small run to do harm to."""

from pathlib import Path

import pytest
import torch

from fathom.data.dataset import Dataset
from fathom.model import build_model
from fathom.train.checkpoint import Parts, Snapshot, snapshot
from fathom.train.config import RunConfig, read_run_config
from fathom.train.guards import SpikeGuard
from fathom.train.optim import Optimizer
from small_corpus import small_corpus

ATTENTION = {
    "kind": "mha",
    "n_heads": 1,
    "n_kv_heads": 1,
    "head_dim": 8,
    "position": {"kind": "rope"},
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(small_corpus(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def cfg(dataset: Dataset) -> RunConfig:
    group = {"count": 1, "attention": ATTENTION, "ffn": {"kind": "dense", "inter_dim": 8}}
    model = {"vocab_size": dataset.vocab_size, "dim": 8, "max_seq_len": 32, "groups": [group]}
    data = {"source": str(dataset.folder), "seq_len": 32}
    return read_run_config(
        {"model": model, "data": data, "train": {"steps": 4, "tokens_per_step": 64}}
    )


@pytest.fixture(scope="session")
def taken(cfg: RunConfig, dataset: Dataset) -> Snapshot:
    """What a checkpoint of that run holds: about 100 kB."""
    model = build_model(cfg.model, seed=1)
    parts = Parts(model, Optimizer(model, cfg.train), SpikeGuard(0.0, torch.device("cpu")))
    return snapshot(cfg, parts, dataset.tokenizer)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty folder, in memory where that can be: a thousand fsyncs of a disk take long."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        return tmp_path
    folder = memory / f"fathom-{tmp_path.name}-{id(tmp_path)}"
    folder.mkdir()
    return folder
