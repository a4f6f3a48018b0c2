"""A bundled corpus in a cache of the test's own, and small corpora made from strings."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fathom.data.config import DataConfig
from fathom.data.corpus import BUNDLED, Document, encode_documents
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.shards import atomic_folder, finish_folder, write_split
from fathom.data.tokenizer import Tokenizer

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED / "tokenizer-1k.json")


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_dataset(DataConfig())


@pytest.fixture
def make_dataset(tmp_path: Path, tokenizer: Tokenizer) -> MakeDataset:
    """``make_dataset(domain=(training texts, held-out texts), ...)``."""

    def make(**texts: tuple[Sequence[str], Sequence[str]]) -> Dataset:
        out = tmp_path / "prepared"
        with atomic_folder(out) as folder:
            domains = []
            for name, splits in texts.items():
                files = {"name": name, "kind": "text"}
                for split, documents in zip(("train", "heldout"), splits, strict=True):
                    named = [Document(f"{name}/{i}", text) for i, text in enumerate(documents)]
                    encoded = encode_documents(named, tokenizer)
                    files[split] = write_split(folder / split, name, tokenizer.vocab_size, encoded)
                domains.append(files)
            finish_folder(folder, tokenizer, domains, {})
        return Dataset(out)

    return make
