"""DSA in two stages: warm-up moves nothing but the indexer, the sparse stage trains everything."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fathom.convert.run_folder import MODEL, OPTIMIZER, committed
from fathom.settings import ConfigError
from fathom.train.config import RunConfig, read_run_config
from fathom.train.loop import TrainResult, train
from fathom.train.metrics import read_lines

ROOT = Path(__file__).parents[2]
MLA = {"n_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
POSITION = {"v_head_dim": 8, "position": {"kind": "rope"}}
INDEXER = {"index_n_heads": 4, "index_head_dim": 8, "index_topk": 6}


@pytest.fixture
def fit(make_config, dataset):
    """Train the attention of ``kind`` with more overrides, in a folder."""

    def run(kind: str, at: Path, *overrides: str) -> TrainResult:
        attention = {**MLA, **POSITION, **(INDEXER if kind == "dsa" else {})}
        given = [f"model.groups.*.attention={toml({'kind': kind, **attention})}"]
        cfg: RunConfig = make_config(*given, *overrides)
        return train(cfg, at, dataset=dataset, should_stop=lambda: False)

    return run


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(committed(run)[-1] / MODEL)


def index_losses(run: Path) -> list[float]:
    return [record["index_loss"] for record in read_lines(run / "metrics.jsonl")]


def test_the_two_stages_of_the_recipe(fit, tmp_path):
    dense, warmup, sparse = (tmp_path / name for name in ("dense", "warmup", "sparse"))
    fit("mla", dense, "train.steps=2")
    assert index_losses(dense) == [0, 0]

    only = ["train.only=['*.indexer.*']", "model.groups.*.attention.index_warmup=true"]
    fit("dsa", warmup, f"train.init_from={dense}", "train.steps=25", *only)
    before, between = weights(dense), weights(warmup)
    assert all(torch.equal(between[name], tensor) for name, tensor in before.items())
    assert all(".indexer." in name for name in between.keys() - before.keys())
    assert sum(index_losses(warmup)[-5:]) < 0.8 * sum(index_losses(warmup)[:5])

    fit("dsa", sparse, f"train.init_from={warmup}", "train.steps=3")
    after = weights(sparse)
    same = {name for name, tensor in between.items() if torch.equal(after[name], tensor)}
    assert not same
    assert all(0 < loss < 1 for loss in index_losses(sparse))


def test_a_pattern_without_a_parameter_is_refused_before_anything_is_written(fit, tmp_path):
    with pytest.raises(ConfigError, match=r"train.only: no parameter is called like '\*.indxer"):
        fit("dsa", tmp_path / "run", "train.only=['*.indxer.*']")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_what_is_frozen_has_no_state_in_the_optimizer_and_the_run_goes_on(fit, tmp_path):
    only = "train.only=['*.indexer.*']"
    fit("dsa", tmp_path, only, "train.steps=2")
    assert all(".indexer." in name for name in load_file(committed(tmp_path)[-1] / OPTIMIZER))
    assert fit("dsa", tmp_path, only, "train.steps=3").step == 3


def test_the_warmup_config_is_the_sparse_one_but_for_its_stage():
    stages = [read_run_config(ROOT / f"configs/dsa-{stage}.toml") for stage in ("warmup", "sparse")]
    first, second = (cfg.model.groups[0].attention for cfg in stages)
    assert (first.index_warmup, second.index_warmup) == (True, False)
    assert {**vars(first), "index_warmup": False} == vars(second)
    assert stages[0].model.groups[0].ffn == stages[1].model.groups[0].ffn
