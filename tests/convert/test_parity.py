"""Against transformers: logits, greedy tokens, and every tensor there and back, of each kind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fathom
from fathom.convert.families import read_config
from peers import CASES, IDS, NEW_TOKENS, hf_load, hf_logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].equal(b[n]) for n in a
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(peer, case):
    theirs = peer(case)
    model = fathom.load(theirs.folder)
    torch.testing.assert_close(model(IDS), theirs.logits, rtol=0, atol=1e-4)
    (result,) = fathom.Engine(model).generate([IDS[0].tolist()], max_new_tokens=NEW_TOKENS)
    assert result.tokens == theirs.greedy


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_written_as_it_came(peer, case, tmp_path):
    theirs = peer(case)
    fathom.save(fathom.load(theirs.folder), tmp_path / "out", format="hf")
    assert same_bits(tensors(tmp_path / "out"), tensors(theirs.folder))
    before = json.loads((theirs.folder / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {key: value for key, value in before.items() if key != "rope_parameters"}
    assert kept.items() <= after.items()
    assert read_config(after, "after") == read_config(before, "before")
    generation = "generation_config.json"
    same = (tmp_path / "out" / generation).read_bytes() == (theirs.folder / generation).read_bytes()
    assert same


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_loaded_by_transformers(peer, case, tmp_path):
    theirs = peer(case)
    fathom.save(fathom.load(theirs.folder), tmp_path / "out", format="hf")
    assert torch.equal(hf_logits(hf_load(tmp_path / "out")), theirs.logits)
