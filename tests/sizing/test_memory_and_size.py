"""Memory to run and to train, and the table that ``size`` makes of it all."""

import json
from dataclasses import replace

import pytest
import torch

from fathom.model import build_model
from fathom.presets import PRESETS, preset
from fathom.sizing import size
from fathom.sizing.memory import memory, training_memory

TINY = ["tiny-llama", "tiny-gqa", "tiny-mla", "tiny-moe", "tiny-deepseek"]


def test_running_takes_weights_and_cache() -> None:
    got = memory(preset("llama-2-7b"), 4096)
    assert got["weights"] == 2 * 6_738_415_616
    assert got["cache"] == 2 * 262_144 * 4096
    assert got["run"] == got["weights"] + got["cache"]
    assert memory(preset("llama-2-7b"), 4096, "float32")["run"] == 2 * got["run"]


def test_training_keeps_sixteen_bytes_a_parameter_mtp_included() -> None:
    got = training_memory(preset("deepseek-v3"), 4096)
    states = got["weights"] + got["gradients"] + got["optimizer"]
    assert states == 16 * (671_026_404_352 + 11_610_067_968)


@pytest.mark.parametrize("name", TINY)
def test_estimated_activations_are_near_what_autograd_keeps(name: str) -> None:
    cfg = preset(name)
    model = build_model(cfg, seed=0)
    tokens_BT = torch.arange(128).view(2, 64)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(tokens_BT, tokens_BT)
    head_gradients = (1 + (cfg.mtp is not None)) * 4 * cfg.vocab_size * cfg.dim
    in_float32 = 2 * training_memory(cfg, tokens_BT.numel())["activations"]
    assert in_float32 == pytest.approx(sum(kept.values()) - head_gradients, rel=0.2)


def test_activations_grow_with_the_tokens_and_logits_stop_at_a_chunk() -> None:
    cfg = preset("llama-3-8b")
    short, long = training_memory(cfg, 1000), training_memory(cfg, 100_000)
    assert long["activations"] == 100 * short["activations"]
    head = 4 * cfg.vocab_size * cfg.dim
    assert short["loss"] == 6 * cfg.vocab_size * 1000 + head
    assert long["loss"] == 2**30 + head


def test_train_is_the_sum_of_its_parts() -> None:
    got = memory(preset("tiny-deepseek"), 64)
    assert got["train"] == sum(map(int, got["train_parts"].values()))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_size_that_json_can_write(name: str) -> None:
    got = json.loads(json.dumps(size(preset(name), seq_len=256)))
    assert set(got) >= {
        "params",
        "active_params",
        "flops_per_token",
        "flops_per_token_causal",
        "cache_bytes_per_token",
        "cache_bytes",
        "rope",
        "mtp_params",
        "memory",
    }
    assert set(got["rope"]) >= {"theta", "longest_wavelength", "half_wavelength"}
    assert got["memory"]["train"] > got["memory"]["weights"] == 2 * got["params"]
    assert got["active_params"] <= got["params"]
    assert got["flops_per_token_causal"] < got["flops_per_token"]


def test_the_presets_own_context_is_the_default_length() -> None:
    cfg = preset("tiny-mla")
    assert size(cfg) == size(cfg, seq_len=512)
    assert size(replace(cfg, max_seq_len=64))["cache_bytes"] == 64 * 640


def test_the_caches_dtype_changes_bytes_alone() -> None:
    narrow = size(preset("deepseek-v2-lite"), seq_len=10, cache_dtype="float8_e4m3fn")
    assert narrow["cache_bytes_per_token"] == 15_552
    wide = size(preset("deepseek-v2-lite"), seq_len=10, cache_dtype="float32")
    assert wide["cache_bytes"] == 4 * narrow["cache_bytes"]
    assert wide["flops_per_token"] == narrow["flops_per_token"]


def test_a_length_or_dtype_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        size(preset("tiny-llama"), seq_len=0)
    with pytest.raises(ValueError, match=r"cache_dtype must be one of float32, .* got 'int4'"):
        size(preset("tiny-llama"), cache_dtype="int4")
