"""A small DeepSeek-like run, and the layouts that it must not notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.data.dataset import Dataset
from fathom.train.config import RunConfig, read_run_config
from small_corpus import small_corpus

MakeConfig = Callable[..., RunConfig]

MLA = {
    "kind": "mla",
    "n_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "position": {"kind": "rope"},
}
MOE = {
    "kind": "moe",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "top_k": 3,
    "inter_dim": 8,
    "score_func": "sigmoid",
    "norm_topk_prob": True,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
    "balance": [
        {"kind": "aux_loss_free"},
        {"kind": "seq_aux_loss", "seq_aux_loss_coeff": 0.01},
        {"kind": "aux_loss", "aux_loss_coeff": 0.01},
        {"kind": "aux_loss", "aux_loss_coeff": 0.02, "over": "step"},
    ],
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(small_corpus(tmp_path_factory.mktemp("data")))


@pytest.fixture
def make_config(dataset: Dataset) -> MakeConfig:
    """``make_config("parallel.dp=2", ...)``: MLA, a dense and a MoE layer, MTP; odd widths."""

    def make(*overrides: str) -> RunConfig:
        data = {
            "model": {
                "vocab_size": dataset.vocab_size,
                "dim": 18,  # whose rows 4 ranks cannot share evenly
                "max_seq_len": 64,
                "groups": [
                    {"count": 1, "attention": MLA, "ffn": {"kind": "dense", "inter_dim": 10}},
                    {"count": 1, "attention": MLA, "ffn": MOE},
                ],
                "mtp": {"n_mtp_modules": 1},
            },
            "data": {"source": str(dataset.folder), "seq_len": 16},
            "train": {
                "steps": 20,
                "tokens_per_step": 256,
                "micro_batch_size": 8,
                "lr": 1e-2,
                "eval_every": 10,
                "eval_bytes": 1000,
                "grad_clip": 0.5,
                "save_every": 10,
            },
        }
        return read_run_config(data, overrides)

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
