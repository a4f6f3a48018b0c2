"""Folders for transformers: bitwise, in shards, whole or not there, with what came along."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fathom
from fathom.api import convert_model, difference
from fathom.convert import load, save
from fathom.convert.checkpoint import open_checkpoint
from fathom.convert.families import read_config
from fathom.convert.fp8 import QUANTIZATION
from fathom.convert.save import of_folder, write_hf
from fathom.convert.source import INDEX, SINGLE
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder, build_model
from peers import IDS, LLAMA, V2, V3, hf_load, hf_logits, yarn


def made(config: dict, seed: int = 3) -> Decoder:
    return build_model(read_config(config, "config.json"), seed=seed)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def v3(tmp_path) -> Path:
    fathom.save(made(V3), tmp_path / "v3", format="hf")
    return tmp_path / "v3"


# --- Files ---


def test_one_file_is_written_where_it_fits_and_says_its_framework(v3):
    assert not (v3 / INDEX).exists()
    with safe_open(v3 / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").shape == (32,)


def test_shards_hold_up_to_a_limit_and_the_index_says_where(tmp_path, monkeypatch):
    model = made(V3)
    monkeypatch.setattr(save, "SHARD_BYTES", 40_000)
    fathom.save(model, tmp_path / "out", format="hf")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    tensors = {name: load_file(tmp_path / "out" / name) for name in files}
    assert {n: f for f, part in tensors.items() for n in part} == index["weight_map"]
    sizes = [sum(t.nbytes for t in part.values()) for part in tensors.values()]
    assert max(sizes) <= 40_000
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert torch.equal(fathom.load(tmp_path / "out")(IDS), model(IDS))
    theirs = hf_logits(hf_load(tmp_path / "out"))
    torch.testing.assert_close(model(IDS), theirs, rtol=0, atol=1e-4)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 100)
    fathom.save(made(LLAMA), tmp_path / "out", format="hf")
    for path in (tmp_path / "out").glob("*.safetensors"):
        part = load_file(path)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 100


def test_equal_models_are_equal_files(tmp_path, v3):
    fathom.save(made(V3), tmp_path / "again", format="hf")
    assert sorted(p.name for p in v3.iterdir()) == sorted(
        p.name for p in (tmp_path / "again").iterdir()
    )
    for path in v3.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_came_along_is_written_again_and_nothing_else(v3, tmp_path):
    extra = {
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"\x00\x01",
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "LICENSE": b"as you like",
        "README.md": b"# Theirs\n",
    }
    for name, content in extra.items():
        (v3 / name).write_bytes(content)
    (v3 / "modeling_theirs.py").write_text("raise SystemExit")
    fathom.save(fathom.load(v3), tmp_path / "out", format="hf")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", SINGLE, *extra}
    for name, content in extra.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_a_model_without_a_card_gets_one(v3):
    card = (v3 / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| layers | 3 |" in card
    assert "| stored as | float32 |" in card


# --- Types ---


def test_half_a_models_bytes_in_bfloat16(v3, tmp_path):
    fathom.save(fathom.load(v3), tmp_path / "out", format="hf", dtype="bfloat16")
    tensors, wide = load_file(tmp_path / "out" / SINGLE), load_file(v3 / SINGLE)
    for name, tensor in tensors.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(tensor, wide[name].to(tensor.dtype))
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"


# Whole blocks: transformers 5.23 takes a cut block's size for the size of all, or refuses it.
BLOCKS = {**LLAMA, "hidden_size": 256, "intermediate_size": 384}


@pytest.mark.parametrize("config", [BLOCKS, V3], ids=["blocks", "v3"])
def test_fp8_is_written_as_transformers_multiplies_it_out(tmp_path, config):
    pytest.importorskip("transformers")
    from transformers import FineGrainedFP8Config

    fathom.save(made(config), tmp_path / "out", format="hf", dtype="fp8")
    assert config_of(tmp_path / "out")["quantization_config"] == QUANTIZATION
    wide = FineGrainedFP8Config(dequantize=True)
    theirs = hf_load(tmp_path / "out", quantization_config=wide)
    ours = fathom.load(tmp_path / "out")
    for name, tensor in theirs.state_dict().items():
        if name.endswith("o_proj.weight"):
            index = name.split(".")[2]
            assert torch.equal(ours.state_dict()[f"blocks.{index}.attention.wo.weight"], tensor)
    torch.testing.assert_close(ours.float()(IDS), hf_logits(theirs.float()), rtol=0, atol=1e-4)


def test_a_folder_is_converted_as_a_model_would_be(v3, tmp_path):
    for dtype in (None, "bfloat16", "fp8"):
        fathom.save(fathom.load(v3), tmp_path / f"model-{dtype}", format="hf", dtype=dtype)
        write_hf(of_folder(open_checkpoint(v3)), tmp_path / f"folder-{dtype}", dtype=dtype)
        for path in (tmp_path / f"model-{dtype}").iterdir():
            other = tmp_path / f"folder-{dtype}" / path.name
            assert other.read_bytes() == path.read_bytes(), (dtype, path.name)


def test_fp8_stays_as_it_is_unless_another_type_is_asked_for(v3, tmp_path):
    fathom.save(fathom.load(v3), tmp_path / "small", format="hf", dtype="fp8")
    opened = open_checkpoint(tmp_path / "small")
    write_hf(of_folder(opened), tmp_path / "kept")
    write_hf(of_folder(opened), tmp_path / "asked", dtype="fp8")
    for name in ("kept", "asked"):
        assert (tmp_path / name / SINGLE).read_bytes() == (tmp_path / "small" / SINGLE).read_bytes()
        assert config_of(tmp_path / name) == config_of(tmp_path / "small")
    write_hf(of_folder(opened), tmp_path / "wide", dtype="float32")
    assert "quantization_config" not in config_of(tmp_path / "wide")
    assert config_of(tmp_path / "wide")["dtype"] == "float32"
    small, wide = fathom.load(tmp_path / "small", dtype="float32"), fathom.load(tmp_path / "wide")
    assert torch.equal(small(IDS), wide(IDS))


# --- Our own models ---


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gqa", "tiny-mla", "tiny-deepseek"])
def test_our_presets_are_the_same_models_in_transformers(name, tmp_path):
    model = fathom.build(name, seed=4)
    for key, tensor in model.state_dict().items():
        if "expert_bias" in key:
            tensor.copy_(torch.linspace(-0.1, 0.1, len(tensor)))
    fathom.save(model, tmp_path / "out", format="hf")
    theirs = hf_load(tmp_path / "out")
    torch.testing.assert_close(model(IDS), hf_logits(theirs), rtol=0, atol=1e-4)
    again = fathom.load(tmp_path / "out")
    assert torch.equal(again(IDS), model(IDS))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_router_without_a_bias_is_written_with_zeros(tmp_path):
    balance = 'groups.1.ffn.balance=[{kind="aux_loss"}]'
    model = fathom.build("tiny-deepseek", balance, seed=4)
    fathom.save(model, tmp_path / "out", format="hf")
    stored = load_file(tmp_path / "out" / SINGLE)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(stored, torch.zeros(16))
    assert torch.equal(fathom.load(tmp_path / "out")(IDS), model(IDS))


def test_our_tokenizer_gives_transformers_the_same_ids(tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    fathom.save(fathom.build("tiny-llama"), tmp_path / "out", format="hf")
    ours = Tokenizer.load(BUNDLED / "tokenizer-1k.json")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "It is a truth universally acknowledged: 3 < 4, naïve \n"
    assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    config = config_of(tmp_path / "out")
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.bos_id, ours.eos_id)
    loaded = fathom.load(tmp_path / "out")
    assert loaded.tokenizer.fingerprint() == ours.fingerprint()  # pyright: ignore


def test_a_model_that_no_family_has_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="cannot be written for Hugging Face"):
        fathom.save(fathom.build("tiny-moe"), tmp_path / "out", format="hf")
    assert list(tmp_path.iterdir()) == []


# --- Whole or not there ---


def test_what_is_there_is_replaced_only_by_force_and_only_if_it_is_a_checkpoint(v3, tmp_path):
    model = made(V2)
    with pytest.raises(ValueError, match="is there already"):
        fathom.save(model, v3, format="hf")
    fathom.save(model, v3, format="hf", force=True)
    assert config_of(v3)["model_type"] == "deepseek_v2"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no checkpoint, so it is not replaced"):
        fathom.save(model, tmp_path / "mine", format="hf", force=True)
    with pytest.raises(ValueError, match="is no checkpoint, so it is not replaced"):
        fathom.save(model, tmp_path / "mine" / "thesis.txt", format="hf", force=True)
    (tmp_path / "link").symlink_to(v3)
    with pytest.raises(ValueError, match="is no checkpoint, so it is not replaced"):
        fathom.save(model, tmp_path / "link", format="hf", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_write_that_fails_leaves_what_was_there(v3, monkeypatch):
    before = {path.name: path.read_bytes() for path in v3.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(save, "write_safetensors", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        fathom.save(made(V2), v3, format="hf", force=True)
    assert {path.name: path.read_bytes() for path in v3.iterdir()} == before
    assert [path.name for path in v3.parent.iterdir()] == ["v3"]


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 999, 999))
    with pytest.raises(ValueError, match=r"would take 0\.0 GB, and .* has 0\.0 GB left"):
        fathom.save(made(LLAMA), tmp_path / "new" / "out", format="hf")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_all_bytes(tmp_path):
    told: list[tuple[str, int, int]] = []
    fathom.save(made(V3), tmp_path / "out", format="hf", progress=lambda *step: told.append(step))
    total = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / SINGLE).values())
    assert {(stage, of) for stage, _, of in told} == {("writing out", total)}
    assert told[-1][1] == total


def test_a_dtype_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, fp8"):
        fathom.save(made(LLAMA), tmp_path / "out", format="hf", dtype="int4")


def test_a_long_context_is_written_with_the_rope_that_stretches_it(tmp_path):
    model = made({**V2, "rope_scaling": yarn(0.707)})
    fathom.save(model, tmp_path / "out", format="hf")
    config = config_of(tmp_path / "out")
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0
    torch.testing.assert_close(model(IDS), hf_logits(hf_load(tmp_path / "out")), rtol=0, atol=1e-4)


# --- From folder to folder ---


def test_a_run_folders_model_becomes_hugging_faces_and_comes_back(tmp_path):
    model = fathom.build("tiny-deepseek", seed=4)
    fathom.save(model, tmp_path / "ours")
    convert_model(tmp_path / "ours", tmp_path / "theirs")
    convert_model(tmp_path / "theirs", tmp_path / "again", format="fathom", dtype="bfloat16")
    assert difference(tmp_path / "ours", tmp_path / "theirs") == (0, 1)
    back = fathom.load(tmp_path / "again")
    assert back.embed.weight.dtype == torch.bfloat16
    assert torch.equal(back.embed.weight, model.embed.weight.bfloat16())


def test_a_folder_is_converted_with_no_model_in_memory(v3, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "uninitialised", lambda *_: pytest.fail("a model was made"))
    convert_model(v3, tmp_path / "small", dtype="fp8")
    convert_model(tmp_path / "small", tmp_path / "half", dtype="bfloat16")
    monkeypatch.undo()
    apart, same = difference(v3, tmp_path / "half")
    assert 0 < apart < 0.1
    assert same > 0.5


def test_fp8_is_only_for_hugging_face(v3, tmp_path):
    with pytest.raises(ValueError, match="dtype fp8 goes with format='hf'"):
        convert_model(v3, tmp_path / "out", format="fathom", dtype="fp8")
    with pytest.raises(ValueError, match="dtype must be one of"):
        convert_model(v3, tmp_path / "out", dtype="int8")
