"""A small prepared corpus and a study of three arms that trains in a second."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fathom.data.corpus import BUNDLED, Document, encode_documents, encode_images
from fathom.data.shards import atomic_folder, finish_folder, write_split
from fathom.data.tokenizer import Tokenizer
from fathom.ladder import stages
from fathom.ladder.run import run_ladder
from fathom.ladder.study import Study
from fathom.settings import Data, override, parse

MakeStudy = Callable[..., Study]
WORDS = {
    "prose": ["the", "cat", "saw", "a", "dog", "and", "it", "ran"],
    "code": ["if", "x:", "return", "y", "+", "1", "else", "z"],
}


def text(domain: str, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS[domain], k=60))


def image(domain: str, seed: int) -> str:
    return "".join(random.Random(seed).choices("0123456789abcdefg", k=64))


@pytest.fixture(scope="session", autouse=True)
def _one_core() -> Iterator[None]:
    """What is timed alone is timed with all cores, which here belong to other tests as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "available_cores", lambda: 1)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text domains and one of images; five held-out documents each."""
    tokenizer = Tokenizer.load(BUNDLED / "tokenizer-1k.json")
    out = tmp_path_factory.mktemp("corpus") / "prepared"
    with atomic_folder(out) as folder:
        domains = []
        for name, write in (("prose", text), ("code", text), ("image", image)):
            files: Data = {"name": name, "kind": "symbols" if write is image else "text"}
            encode = encode_images if write is image else encode_documents
            for split, seeds in (("train", range(12)), ("heldout", range(100, 105))):
                documents = [Document(f"{name}/{seed}", write(name, seed)) for seed in seeds]
                encoded = encode(documents, tokenizer)
                files[split] = write_split(folder / split, name, tokenizer.vocab_size, encoded)
            domains.append(files)
        finish_folder(folder, tokenizer, domains, {})
    return out


@pytest.fixture(scope="session")
def make_study(corpus: Path) -> MakeStudy:
    """``make_study("budget.value=512", ...)``: mha, mqa and moe on the small corpus, four steps."""

    def make(*overrides: str) -> Study:
        return parse(Study, override(study_data(corpus), overrides))

    return make


def study_data(corpus: Path) -> Data:
    attention = {"kind": "mha", "n_heads": 2, "n_kv_heads": 2, "head_dim": 8}
    moe = '{ kind = "moe", n_routed_experts = 4, top_k = 2, inter_dim = 16 }'
    return {
        "name": "micro",
        "title": "A micro study",
        "question": "Does it run?",
        "seeds": [1, 2, 3],
        "margin": 0.02,
        "budget": {"hold": "tokens", "value": 512},
        "data": {"source": str(corpus), "seq_len": 32},
        "train": {"tokens_per_step": 128, "device": "cpu", "lr": 0.02, "eval_every": 2},
        "model": {
            "dim": 16,
            "max_seq_len": 64,
            "tie_embeddings": True,
            "groups": [
                {
                    "count": 2,
                    "attention": {**attention, "position": {"kind": "rope"}},
                    "ffn": {"kind": "dense", "inter_dim": 32},
                }
            ],
        },
        "arms": [
            {"name": "mha"},
            {
                "name": "mqa",
                "parent": "mha",
                "claim": "Is one key-value head enough?",
                "change": ["model.groups.*.attention.n_kv_heads=1"],
                "fit": "params",
            },
            {
                "name": "moe",
                "parent": "mha",
                "claim": "Do experts help?",
                "change": [f"model.groups.*.ffn={moe}"],
            },
        ],
    }


@pytest.fixture(scope="session")
def finished_ladder(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that study, run to its end in this process. Tests leave it as it is."""
    out = tmp_path_factory.mktemp("ladder") / "micro"
    study = make_study('probes=["position", "routing"]')
    assert run_ladder(study, out, jobs=0).reason == "done"
    return out
