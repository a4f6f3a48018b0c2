"""A small corpus of two text domains and one of images, and the config of a model that fits it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.data.corpus import BUNDLED, Document, encode_documents, encode_images
from fathom.data.dataset import Dataset
from fathom.data.shards import atomic_folder, finish_folder, write_split
from fathom.data.tokenizer import Tokenizer
from fathom.train.config import RunConfig, read_run_config
from fathom.train.loop import TrainResult, train

MakeConfig = Callable[..., RunConfig]

TEXT = "the latent head keeps one key for every token and asks which expert knows it"


def prose(seed: int) -> str:
    """Words in an order that a model can partly learn."""
    draw, words = random.Random(seed), TEXT.split()
    return " ".join(words[(draw.randrange(3) + 4 * i) % len(words)] for i in range(120))


def code(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(f"def f{draw.randrange(50)}(x):\n    return x + {i}\n" for i in range(20))


def image(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("00gg8") for _ in range(64))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED / "tokenizer-1k.json")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Dataset:
    out = tmp_path_factory.mktemp("data") / "prepared"
    sources = {"prose": (prose, "text"), "code": (code, "text"), "image": (image, "symbols")}
    with atomic_folder(out) as folder:
        domains = []
        for name, (write, kind) in sources.items():
            files = {"name": name, "kind": kind}
            encode = encode_images if kind == "symbols" else encode_documents
            for split, seeds in (("train", range(12)), ("heldout", range(100, 105))):
                documents = [Document(f"{name}/{seed}", write(seed)) for seed in seeds]
                encoded = encode(documents, tokenizer)
                files[split] = write_split(folder / split, name, tokenizer.vocab_size, encoded)
            domains.append(files)
        finish_folder(folder, tokenizer, domains, {})
    return Dataset(out)


MOE = {
    "kind": "moe",
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "top_k": 2,
    "inter_dim": 16,
    "balance": [{"kind": "aux_loss_free"}, {"kind": "seq_aux_loss"}],
}
MHA = {
    "kind": "mha",
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 16,
    "position": {"kind": "rope"},
}


@pytest.fixture
def make_config(dataset: Dataset) -> MakeConfig:
    """``make_config("train.lr=1e-2", ...)``: a dense layer, a MoE layer and MTP, 32 channels."""

    def make(*overrides: str) -> RunConfig:
        data = {
            "model": {
                "vocab_size": dataset.vocab_size,
                "dim": 32,
                "max_seq_len": 64,
                "groups": [
                    {"count": 1, "attention": MHA, "ffn": {"kind": "dense", "inter_dim": 48}},
                    {"count": 1, "attention": MHA, "ffn": MOE},
                ],
                "mtp": {"n_mtp_modules": 1},
            },
            "data": {"source": str(dataset.folder), "seq_len": 32},
            "train": {"steps": 6, "tokens_per_step": 128, "lr": 1e-2, "eval_every": 0},
        }
        return read_run_config(data, overrides)

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def fit(dataset: Dataset, run_dir: Path) -> Callable[..., TrainResult]:
    """Train in ``run_dir``; ``at`` names another folder, ``stop_at`` a step to stop after."""

    def run(cfg: RunConfig, at: Path = run_dir, stop_at: int | None = None, **more) -> TrainResult:
        calls = iter(range(1, 10**6))
        stop = (lambda: next(calls) == stop_at) if stop_at else (lambda: False)
        return train(cfg, at, dataset=dataset, **{"should_stop": stop, **more})

    return run
