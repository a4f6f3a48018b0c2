"""DeepSeek's shapes as GGUF: the library's names, the fields, and every number found again."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES
from safetensors.torch import load_file
from torch import Tensor

import fathom
from fathom.convert.checkpoint import Origin
from fathom.convert.families import read_config
from fathom.model import Decoder, build_model
from peers import V2, V3, V32

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
V3_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "v2": V2 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "v3": V3 | {"rope_scaling": V3_YARN},
    "v3-mtp": V3 | {"num_nextn_predict_layers": 1},
}


def model_of(kind: str) -> Decoder:
    model = build_model(read_config(CONFIGS[kind], "config.json"), seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            torch.nn.init.normal_(buffer)
    return model


def written(model: Decoder, path: Path, **options: Any) -> gguf.GGUFReader:
    fathom.save(model, path, format="gguf", **options)
    return gguf.GGUFReader(path)


def values(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    return {t.name: torch.from_numpy(np.array(t.data)).float() for t in reader.tensors}


def place_of(name: str, found: dict[str, Tensor], heads: tuple[int, int]) -> tuple[str, Tensor]:
    """Where the library's own table of names puts a Hugging Face tensor, and what is there."""
    library = gguf.get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, 8)

    def named(stem: str, last: str = "weight") -> str:
        place = library.get_name(stem)
        assert place is not None, stem
        return f"{place}.{last}"

    stem, _, last = name.rpartition(".")
    if ".experts." in name:
        before, _, rest = stem.partition(".experts.")
        expert, _, part = rest.partition(".")
        place = named(f"{before}.experts.{part}")
        return place, found[place][int(expert)]
    if stem.endswith("kv_b_proj"):
        place = named(stem.replace("kv_b", "k_b"))
        up = [found[place].transpose(1, 2), found[named(stem.replace("kv_b", "v_b"))]]
        assert (up[0].shape[1], up[1].shape[1]) == heads
        return place, torch.cat(up, dim=1).flatten(0, 1)
    if last == "e_score_correction_bias":
        place = named(f"{stem}.e_score_correction", "bias")
        return place, found[place]
    return named(stem, last), found[named(stem, last)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_number_of_the_model_is_in_the_file(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    found = values(written(model, tmp_path / "m.gguf"))
    fathom.save(model, tmp_path / "hf", format="hf")
    places = {name.replace("attn_k_b", "attn_v_b") for name in found if "attn_k_b" in name}
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        if name.startswith(f"model.layers.{model.cfg.n_layers}."):
            continue  # an MTP module
        place, value = place_of(name, found, heads=(12, 10))
        wide = value.dim() == 1 or name.endswith("mlp.gate.weight")
        assert torch.equal(value, tensor if wide else tensor.half().float()), name
        places.add(place)
    assert places == found.keys()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_names_are_those_the_library_has_for_this_architecture(kind, tmp_path: Path) -> None:
    names = {TENSOR_NAMES[t] for t in MODEL_TENSORS[MODEL_ARCH.DEEPSEEK2]}
    for tensor in written(model_of(kind), tmp_path / "m.gguf").tensors:
        stem, _, last = tensor.name.rpartition(".")
        parts = stem.split(".")
        assert (f"blk.{{bid}}.{parts[2]}" if parts[0] == "blk" else stem) in names
        assert last in ("weight", "bias")


def test_the_fields_say_how_it_runs(tmp_path: Path) -> None:
    reader = written(model_of("v3"), tmp_path / "m.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "deepseek2"
    want = {
        "block_count": 3,
        "leading_dense_block_count": 1,
        "feed_forward_length": 40,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 24,
        "attention.kv_lora_rank": 16,
        "attention.key_length": 16 + 8,
        "attention.value_length": 16,
        "attention.key_length_mla": 12 + 8,
        "attention.value_length_mla": 10,
        "rope.dimension_count": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "expert_count": 16,
        "expert_used_count": 3,
        "expert_shared_count": 2,
        "expert_feed_forward_length": 16,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
    }
    assert {name: said[f"deepseek2.{name}"] for name in want} == want
    assert said["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_rows_of_whole_blocks_are_quantised(tmp_path: Path) -> None:
    reader = written(model_of("v2"), tmp_path / "m.gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.1.ffn_gate_exps.weight"] == "Q8_0"  # rows of 32
    assert kinds["blk.1.ffn_down_exps.weight"] == "F16"  # rows of 16
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (V3 | {"attention_bias": True}, "no biases in its attention"),
        (V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "best two"),
        (V3 | {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "no field for"),
        (V3 | {"first_k_dense_replace": 3}, "GGUF has those of V2 and V3"),
        (V32, "GGUF has those of V2 and V3"),
    ],
    ids=["bias", "groups", "yarn", "dense", "indexer"],
)
def test_what_the_architecture_cannot_say_is_refused(changes, sentence, tmp_path: Path) -> None:
    model = build_model(read_config(changes, "config.json"), seed=0)
    with pytest.raises(ValueError, match=sentence):
        fathom.save(model, tmp_path / "m.gguf", format="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_rope_rows_that_a_folder_holds_in_halves_are_refused(tmp_path: Path) -> None:
    model = build_model(read_config(V3, "config.json"), seed=0)
    object.__setattr__(model, "origin", Origin(V3 | {"rope_interleave": False}))
    with pytest.raises(ValueError, match="rope_interleave"):
        fathom.save(model, tmp_path / "m.gguf", format="gguf")
