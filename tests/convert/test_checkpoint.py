"""Folders of other projects: every tensor accounted for, MTP kept, other names, other layouts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fathom
from fathom.config import MTPConfig
from fathom.convert import load
from fathom.convert.checkpoint import open_checkpoint
from fathom.convert.families import read_config
from fathom.convert.llama import llama_rules
from fathom.convert.names import to_hugging_face
from fathom.convert.rules import filled_by
from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import SINGLE
from fathom.model import Decoder, build_model
from peers import IDS, LLAMA, V2, V3, yarn

ONE_MTP = {**V3, "num_nextn_predict_layers": 1, "num_hidden_layers": 2}
MTP = "model.layers.2."


def write(folder: Path, config: dict[str, Any]) -> Decoder:
    """A folder with a random model of a config; returns the model."""
    model = build_model(read_config(config, "config.json"), seed=5)
    for name, tensor in model.state_dict().items():
        if "norm" in name or "bias" in name:
            tensor += torch.linspace(-0.05, 0.05, tensor.numel()).view(tensor.shape)
    fathom.save(model, folder, format="hf")
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "model"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_state(a: Decoder, b: Decoder) -> bool:
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(mine[name].equal(yours[name]) for name in mine)


# --- Every tensor accounted for ---

NORM = "model.layers.1.input_layernorm.weight"


def make(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


WRONG = {
    "missing": (lambda tensors: tensors.pop(NORM), f"lacks the tensor '{NORM}', which"),
    "two missing": (
        lambda tensors: [tensors.pop(NORM), tensors.pop("model.norm.weight")],
        "lacks the tensor 'model.norm.weight' and 1 more",
    ),
    "surplus": (make("model.extra.weight", torch.ones(2)), "holds the tensor 'model.extra.weight'"),
    "expert missing": (
        lambda tensors: tensors.pop("model.layers.1.mlp.experts.15.up_proj.weight"),
        r"lacks the tensor '.*experts\.15\.up_proj\.weight'",
    ),
    "another expert": (
        make("model.layers.1.mlp.experts.16.up_proj.weight", torch.ones(16, 32)),
        r"holds the tensor '.*experts\.16\.up_proj\.weight'",
    ),
    "longer": (make(NORM, torch.ones(33)), rf"'{NORM}' is \[33\] of float32, and must be \[32\]"),
    "turned": (
        make("model.layers.1.mlp.gate.weight", torch.ones(32, 16)),
        r"is \[32, 16\] of float32, and must be \[16, 32\]",
    ),
    "deeper": (make(NORM, torch.ones(32, 1)), r"is \[32, 1\]"),
    "whole numbers": (make(NORM, torch.ones(32, dtype=torch.int64)), "of int64, and must be"),
    "fp8 without a scale": (
        make("lm_head.weight", torch.ones(96, 32).to(torch.float8_e4m3fn)),
        r"lacks the tensor 'lm_head\.weight_scale_inv'",
    ),
    "e5m2": (make(NORM, torch.ones(32).to(torch.float8_e5m2)), "of float8_e5m2, and must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_that_does_not_fit_is_named_before_memory_is_taken(folder, case, monkeypatch):
    write(folder, ONE_MTP)
    change, message = WRONG[case]
    change_tensors(folder, change)
    monkeypatch.setattr(load, "uninitialised", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=message):
        fathom.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1000, "n_routed_experts": 4096, "n_group": 1, "topk_group": 1},
        {"vocab_size": 2**20, "hidden_size": 2**16},
        {"kv_lora_rank": 2**16, "num_attention_heads": 2**12, "num_key_value_heads": 2**12},
        {"num_hidden_layers": 40},
    ],
    ids=["layers and experts", "tables", "heads", "some layers"],
)
def test_a_config_that_asks_for_more_than_the_file_holds_is_refused(folder, changes, monkeypatch):
    write(folder, ONE_MTP)
    change_config(folder, **changes)
    monkeypatch.setattr(load, "uninitialised", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=str(folder)):
        fathom.load(folder)


def test_tables_of_rope_are_left_out(folder):
    model = write(folder, LLAMA)
    change_tensors(folder, make("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    assert same_state(fathom.load(folder), model)


def test_the_copy_of_a_tied_head_must_be_a_copy(folder):
    model = write(folder, {**LLAMA, "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(folder / SINGLE)
    change_tensors(folder, make("lm_head.weight", model.embed.weight.detach()))
    assert same_state(fathom.load(folder), model)
    change_tensors(folder, make("lm_head.weight", torch.zeros(96, 32)))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from .* embed\.weight"):
        fathom.load(folder)


def test_weights_come_as_stored_or_as_asked_and_the_routing_bias_in_float32(folder, tmp_path):
    model = write(folder, V3)
    fathom.save(model, tmp_path / "half", format="hf", dtype="bfloat16")
    half = fathom.load(tmp_path / "half")
    for name, tensor in half.state_dict().items():
        stored = model.state_dict()[name]
        want = stored if "expert_bias" in name else stored.bfloat16()
        assert tensor.dtype == want.dtype, name
        assert tensor.equal(want), name
    assert fathom.load(tmp_path / "half", dtype="float32").embed.weight.dtype == torch.float32


def test_progress_counts_up_to_all_bytes(folder):
    write(folder, V3)
    told: list[tuple[str, int, int]] = []
    fathom.load(folder, progress=lambda *step: told.append(step))
    total = sum(tensor.nbytes for tensor in load_file(folder / SINGLE).values())
    assert {(stage, of) for stage, _, of in told} == {("loading model", total)}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == total


def test_size_is_read_from_the_config_alone(folder):
    model = write(folder, V3)
    (folder / SINGLE).unlink()
    assert fathom.size(folder, seq_len=9) == fathom.size(model.cfg, seq_len=9)
    assert fathom.build(folder, seed=1).cfg == model.cfg


# --- Multi-token prediction ---


def test_mtp_layers_are_kept_with_their_copies_of_embedding_and_head(folder, tmp_path):
    model = write(folder, ONE_MTP)
    stored = load_file(folder / SINGLE)
    assert torch.equal(stored[MTP + "embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored[MTP + "shared_head.head.weight"], stored["lm_head.weight"])
    again = fathom.load(folder)
    assert same_state(again, model)
    assert torch.equal(again.mtp_logits(IDS)[0], model.mtp_logits(IDS)[0])
    fathom.save(again, tmp_path / "again", format="hf")
    assert (tmp_path / "again" / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()


def test_mtp_copies_may_be_absent_but_not_differ(folder):
    model = write(folder, ONE_MTP)
    change_tensors(folder, lambda tensors: tensors.pop(MTP + "shared_head.head.weight"))
    assert same_state(fathom.load(folder), model)
    change_tensors(folder, make(MTP + "embed_tokens.weight", torch.zeros(96, 32)))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' differs"):
        fathom.load(folder)


def test_a_promised_mtp_layer_that_is_not_there_is_no_mtp(folder, tmp_path):
    model = write(folder, {**V3, "num_hidden_layers": 2})
    change_config(folder, num_nextn_predict_layers=1)
    again = fathom.load(folder)
    assert same_state(again, model)
    assert again.cfg.mtp is None
    fathom.save(again, tmp_path / "again", format="hf")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"]
        == 0
    )


def test_half_an_mtp_layer_is_refused(folder):
    write(folder, ONE_MTP)
    change_tensors(folder, lambda tensors: tensors.pop(MTP + "eh_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.2\.eh_proj"):
        fathom.load(folder)


def test_mtp_layers_are_left_out_where_v3s_config_asks_for_none(folder):
    model = write(folder, ONE_MTP)
    change_config(folder, num_nextn_predict_layers=0)
    again = fathom.load(folder)
    assert again.cfg == replace(model.cfg, mtp=None)
    assert torch.equal(again(IDS), model(IDS))


def test_layers_past_the_last_are_surplus_in_other_families(folder):
    write(folder, LLAMA)
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"holds the tensor 'model\.layers\.1\."):
        fathom.load(folder)


# --- FP8 ---


def test_fp8_is_multiplied_out_and_kept_scales_may_lie_in_another_file(folder, tmp_path):
    model = write(folder, V3)
    fathom.save(model, tmp_path / "small", format="hf", dtype="fp8")
    tensors = load_file(tmp_path / "small" / SINGLE)
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        parts["b.safetensors" if "scale_inv" in name else "a.safetensors"][name] = tensor
    (tmp_path / "small" / SINGLE).unlink()
    for file, part in parts.items():
        save_file(part, tmp_path / "small" / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "small" / "model.safetensors.index.json").write_text(index)
    again = fathom.load(tmp_path / "small")
    assert again.embed.weight.dtype == torch.bfloat16
    for name, tensor in again.state_dict().items():
        wide = model.state_dict()[name]
        assert (tensor.float() - wide).norm() < 0.04 * wide.norm(), name


# --- Other projects' names ---

OFFICIAL = {
    "vocab_size": 96,
    "dim": 32,
    "inter_dim": 40,
    "moe_inter_dim": 16,
    "n_layers": 3,
    "n_dense_layers": 1,
    "n_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "n_activated_experts": 3,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "original_seq_len": 16,
    "max_seq_len": 128,
    "rope_factor": 8,
    "dtype": "bf16",
}


def official_name(name: str) -> str:
    """The renaming of DeepSeek's conversion script, step by step."""
    name = name.removeprefix("model.")
    for theirs, ours in (
        ("self_attn", "attn"),
        ("mlp", "ffn"),
        ("weight_scale_inv", "scale"),
        ("e_score_correction_bias", "bias"),
    ):
        name = name.replace(theirs, ours)
    parts = name.split(".")
    at = -2 if parts[-1] in ("weight", "scale", "bias") else -1
    mapping = {
        "embed_tokens": "embed",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "wq",
        "q_a_proj": "wq_a",
        "q_a_layernorm": "q_norm",
        "q_b_proj": "wq_b",
        "kv_a_proj_with_mqa": "wkv_a",
        "kv_a_layernorm": "kv_norm",
        "kv_b_proj": "wkv_b",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        "lm_head": "head",
    }
    parts[at] = mapping.get(parts[at], parts[at])
    return ".".join(parts)


def test_deepseeks_names_are_translated_back(folder):
    write(folder, {**V3, "attention_bias": True})
    for name in load_file(folder / SINGLE):
        assert to_hugging_face(official_name(name)) == name
    for part in ("wq_b.weight", "wk.weight", "k_norm.bias", "weights_proj.weight"):
        indexer = f"model.layers.3.self_attn.indexer.{part}"
        assert to_hugging_face(f"layers.3.attn.indexer.{part}") == indexer
    scale = "model.layers.3.self_attn.kv_b_proj.weight_scale_inv"
    assert to_hugging_face("layers.3.attn.wkv_b.scale") == scale


def split_over(tensors: dict[str, Tensor], ranks: int, rank: int) -> dict[str, Tensor]:
    """One rank's part, as DeepSeek's conversion script splits a model."""
    dims = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0}
    dims |= {"wo": 1, "w2": 1}
    part = {}
    for name, tensor in tensors.items():
        if ".experts." in name and "shared_experts" not in name:
            if int(name.split(".")[-3]) // (16 // ranks) == rank:
                part[name] = tensor
        elif (dim := dims.get(name.split(".")[-2])) is not None:
            part[name] = tensor.chunk(ranks, dim)[rank].contiguous()
        else:
            part[name] = tensor
    return part


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepseeks_own_files_give_the_model_of_their_hugging_face_twin(folder, tmp_path, ranks):
    model = write(folder, {**V3, "rms_norm_eps": 1e-6, "rope_scaling": yarn(1.0)})
    tensors = {official_name(name): tensor for name, tensor in load_file(folder / SINGLE).items()}
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(OFFICIAL))
    for rank in range(ranks):
        save_file(split_over(tensors, ranks, rank), own / f"model{rank}-mp{ranks}.safetensors")
    again = fathom.load(own)
    assert again.cfg == model.cfg
    assert same_state(again, model)
    fathom.save(again, tmp_path / "hf", format="hf")
    assert same_state(fathom.load(tmp_path / "hf"), model)
    if ranks == 2:
        (own / "model1-mp2.safetensors").unlink()
        with pytest.raises(CheckpointError, match="some of the files model<rank>"):
            fathom.load(own)


def test_a_rank_that_disagrees_is_refused(folder, tmp_path):
    write(folder, V3)
    tensors = {official_name(name): tensor for name, tensor in load_file(folder / SINGLE).items()}
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(OFFICIAL))
    save_file(split_over(tensors, 2, 0), own / "model0-mp2.safetensors")
    save_file(tensors, own / "model1-mp2.safetensors")
    with pytest.raises(CheckpointError, match="the ranks do not agree on the tensor"):
        fathom.load(own)


def test_deepseeks_config_keeps_the_defaults_of_its_code():
    from fathom.convert.official import deepseek_config

    config = deepseek_config({"n_activated_experts": 6, "mscale": 0.707}, "config.json")
    cfg = read_config(config, "config.json")
    lite = fathom.preset("deepseek-v2-lite")
    assert fathom.size(cfg, seq_len=5) == fathom.size(lite, seq_len=5)
    assert "rope_scaling" not in deepseek_config(
        {"n_activated_experts": 6, "max_seq_len": 4096}, "config.json"
    )
    indexer = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    v32 = {**OFFICIAL, **indexer, "scale_fmt": "ue8m0"}
    attention = read_config(deepseek_config(v32, "c"), "c").groups[0].attention
    assert attention.kind == "dsa"
    assert {key: getattr(attention, key) for key in indexer} == indexer
    with pytest.raises(CheckpointError, match="gate_noise is 1, which is not followed"):
        deepseek_config({"n_activated_experts": 6, "gate_noise": 1}, "config.json")


PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 44,
    "ffn_dim_multiplier": 0.5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_seq_len": 128,
}


def meta_name(name: str) -> str:
    """Llama's own names."""
    for theirs, ours in {
        "model.": "",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn": "attention",
        "mlp": "feed_forward",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
    }.items():
        name = name.replace(theirs, ours)
    return name


def adjacent_pairs(name: str, tensor: Tensor) -> Tensor:
    """Query and key rows as Meta has them: pairs side by side, from halves, by head."""
    if name.split(".")[-2] not in ("wq", "wk"):
        return tensor
    return tensor.view(-1, 2, 4, 32).transpose(1, 2).reshape(-1, 32)


def test_metas_own_files_give_the_model_of_their_hugging_face_twin(folder, tmp_path):
    model = write(folder, LLAMA)
    own = tmp_path / "own"
    own.mkdir()
    named = {meta_name(name): tensor for name, tensor in load_file(folder / SINGLE).items()}
    turned = {name: adjacent_pairs(name, tensor) for name, tensor in named.items()}
    save_file(turned, own / "consolidated.safetensors")
    (own / "params.json").write_text(json.dumps(PARAMS))
    again = fathom.load(own)
    assert again.cfg == model.cfg
    assert same_state(again, model)
    fathom.save(again, tmp_path / "hf", format="hf")
    assert (tmp_path / "hf" / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()
    rules = llama_rules(model.cfg, interleaved=True)
    wrote = {name: rule.save(p) for name, (rule, p) in filled_by(rules, model.state_dict()).items()}
    assert all(torch.equal(wrote[to_hugging_face(name)], turned[name]) for name in turned)


def test_metas_stretched_rope_must_say_how_far():
    from fathom.convert.official import meta_config

    stretched = {**PARAMS, "use_scaled_rope": True}
    with pytest.raises(CheckpointError, match="rope_scaling_factor"):
        meta_config(stretched, "params.json")
    config = meta_config({**stretched, "rope_scaling_factor": 32}, "params.json")
    assert config["rope_scaling"]["factor"] == 32
    with pytest.raises(CheckpointError, match="moe is"):
        meta_config({**PARAMS, "moe": {}}, "params.json")


def test_the_words_of_a_model_of_words_and_images_are_loaded_alone(folder):
    model = write(folder, V2)
    config = json.loads((folder / "config.json").read_text())
    images = {"model_type": "words_and_images", "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(images))
    tensors = {f"language_model.{name}": t for name, t in load_file(folder / SINGLE).items()}
    save_file({**tensors, "vision_tower.patch.weight": torch.ones(2)}, folder / SINGLE)
    again = fathom.load(folder)
    assert again.cfg == model.cfg
    assert same_state(again, model)
    assert fathom.size(folder, seq_len=3) == fathom.size(model.cfg, seq_len=3)


def test_two_tensors_of_one_name_are_refused(folder):
    write(folder, LLAMA)
    change_tensors(
        folder,
        lambda tensors: [
            tensors.update({meta_name(name): tensors.pop(name) for name in list(tensors)}),
            tensors.update({"embed.weight": torch.ones(1)}),
        ],
    )
    with pytest.raises(CheckpointError, match="are one tensor"):
        open_checkpoint(folder)


def test_mtp_config_of_several_modules_is_kept(folder):
    model = write(folder, {**ONE_MTP, "num_nextn_predict_layers": 2})
    assert model.cfg.mtp == MTPConfig(n_mtp_modules=2)
    assert same_state(fathom.load(folder), model)
