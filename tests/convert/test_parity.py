"""Against transformers: logits, greedy tokens, and every tensor there and back, of each kind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fathom
from fathom.convert.families import read_config
from peers import CASES, IDS, LLAMA, NEW_TOKENS, V2, hf_load, hf_logits, hf_model


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


def test_kimi_k2_is_a_v3_by_another_name(peer, tmp_path):
    theirs = peer("moonlight")
    shutil.copytree(theirs.folder, tmp_path / "kimi")
    config = json.loads((tmp_path / "kimi" / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.X"}}
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(config))
    model = fathom.load(tmp_path / "kimi")
    torch.testing.assert_close(model(IDS), theirs.logits, rtol=0, atol=1e-4)
    fathom.save(model, tmp_path / "out", format="hf")
    assert torch.equal(hf_logits(hf_load(tmp_path / "out")), theirs.logits)


def test_v1_is_llama_with_the_experts_of_v2(tmp_path):
    """transformers has no class for V1: its parts are put together here."""
    pytest.importorskip("transformers")
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    theirs = hf_model({**LLAMA, "num_key_value_heads": 4, "num_hidden_layers": 3})
    moe = {key: value for key, value in V2.items() if key != "model_type"}
    moe_config = DeepseekV2Config(**{**moe, "intermediate_size": 44})
    moe_config._experts_implementation = "eager"
    for layer in theirs.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(moe_config).eval()
        for parameter in layer.mlp.parameters():
            torch.nn.init.normal_(parameter, 0, 0.15)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        stored |= one_by_one(name, tensor) if ".experts." in name else {name: tensor}
    config = {**LLAMA, **{key: moe[key] for key in moe if "expert" in key or "moe" in key}}
    config |= {"model_type": "deepseek", "num_hidden_layers": 3, "first_k_dense_replace": 1}
    config |= {"num_key_value_heads": 4, "norm_topk_prob": False}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = fathom.load(tmp_path)
    torch.testing.assert_close(model(IDS), hf_logits(theirs), rtol=0, atol=1e-4)
    fathom.save(model, tmp_path / "out", format="hf")
    assert same_bits(tensors(tmp_path / "out"), stored)


def one_by_one(name: str, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
    """The experts of a stacked tensor of transformers, as they lie on disk."""
    prefix, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return {
        f"{prefix}.{e}.{part}.weight": tensor.clone()
        for e, expert in enumerate(stacked)
        for part, tensor in zip(parts, expert.chunk(len(parts)), strict=True)
    }
