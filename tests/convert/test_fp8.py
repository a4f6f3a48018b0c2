"""FP8 in blocks: there and back, cut blocks, and DeepSeek-V3's whole file from its config alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.convert.checkpoint import layout
from fathom.convert.families import family_of, read_config
from fathom.convert.fp8 import (
    E4M3,
    QUANTIZATION,
    SCALE,
    Dequantised,
    Quantised,
    blocks,
    check_quantization,
    dequantise,
    quantise,
    scales,
)
from fathom.convert.hf_config import HFConfig
from fathom.convert.run_folder import CheckpointError
from fathom.convert.save import ModelSource, in_dtype
from fathom.convert.source import Entry, TensorSource


class Dictionary(TensorSource):
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def entries(self) -> dict[str, Entry]:
        return {n: Entry(tuple(t.shape), t.dtype, t.nbytes) for n, t in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


NAME = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
SHAPES = [(128, 128), (300, 130), (1, 1), (127, 257), (256, 1)]


def element_by_element(weight: Tensor, scale: Tensor) -> Tensor:
    """The definition: each element times the factor of the block that it lies in."""
    rows = torch.arange(weight.shape[0]) // 128
    columns = torch.arange(weight.shape[1]) // 128
    return weight.float() * scale[rows][:, columns]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_multiplied_by_its_blocks_factor(shape):
    weight = torch.randn(shape).to(E4M3)
    scale = torch.rand(blocks(shape)) + 0.5
    assert torch.equal(dequantise(weight, scale), element_by_element(weight, scale))


def test_scales_may_be_stored_as_powers_of_two():
    weight, scale = torch.randn(130, 20).to(E4M3), torch.tensor([[0.25], [2.0]])
    stored = {NAME: weight, NAME + SCALE: scale.to(torch.float8_e8m0fnu)}
    got = Dequantised(Dictionary(stored)).read(NAME)
    assert torch.equal(got, element_by_element(weight, scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_of_a_block_becomes_the_largest_e4m3_number(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    scale = scales(weight)
    assert scale.shape == blocks(shape)
    assert scale.dtype == torch.float32
    for i, j in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        assert scale[i, j] == weight[block].abs().max() / 448
        assert quantise(weight, scale)[block].float().abs().max() == 448


def test_quantising_gaussian_weights_costs_2_6_percent():
    torch.manual_seed(0)
    weight = torch.randn(512, 640)
    scale = scales(weight)
    error = (dequantise(quantise(weight, scale), scale) - weight).norm() / weight.norm()
    assert error == pytest.approx(0.026, abs=0.001)


def test_what_was_quantised_once_is_quantised_the_same_again():
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    small = quantise(weight, scales(weight))
    wide = dequantise(small, scales(weight))
    assert torch.equal(quantise(wide, scales(wide)).float(), small.float())


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(3, 200)
    scale = scales(weight)
    assert torch.equal(dequantise(quantise(weight, scale), scale), weight)
    assert (scale == torch.tensor(1e-4) / 448).all()


def test_a_source_of_fp8_gives_float32_and_hides_the_scales():
    weight, scale = torch.randn(130, 20).to(E4M3), torch.rand(2, 1)
    source = Dequantised(
        Dictionary({NAME: weight, NAME + SCALE: scale, "norm": torch.ones(3).bfloat16()})
    )
    assert source.entries == {
        NAME: Entry((130, 20), torch.float32, 130 * 20 + 8),
        "norm": Entry((3,), torch.bfloat16, 6),
    }
    assert torch.equal(source.read(NAME), element_by_element(weight, scale))
    assert source.read("norm").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "lacks the tensor"),
        ({NAME + SCALE: torch.ones(1, 1)}, r"needs \[2, 1\]"),
        ({NAME + SCALE: torch.ones(2)}, r"needs \[2, 1\]"),
        ({NAME + SCALE: torch.ones(2, 1, dtype=torch.int64)}, "needs"),
    ],
    ids=["none", "too few", "flat", "whole numbers"],
)
def test_fp8_without_the_scale_that_it_needs_is_refused(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        Dequantised(Dictionary({NAME: torch.ones(130, 20).to(E4M3), **tensors}))


def test_quantised_projections_are_written_with_scales_and_all_else_as_it_is():
    torch.manual_seed(0)
    tensors = {
        NAME: torch.randn(130, 20),
        "model.layers.0.mlp.experts.3.up_proj.weight": torch.randn(8, 4),
        "model.layers.0.self_attn.indexer.wk.weight": torch.randn(8, 4),
        "model.layers.0.self_attn.indexer.weights_proj.weight": torch.randn(4, 4),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 4),
        "model.layers.0.self_attn.q_a_layernorm.weight": torch.randn(4),
        "model.layers.3.eh_proj.weight": torch.randn(4, 8),
        "model.embed_tokens.weight": torch.randn(4, 4),
        "lm_head.weight": torch.randn(4, 4),
    }
    source = Quantised(Dictionary(tensors))
    made = {name: source.read(name) for name in source.entries}
    small = [name for name in made if made[name].dtype == E4M3]
    assert small == [
        NAME,
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.layers.0.self_attn.indexer.wk.weight",
    ]
    assert set(made) == {*tensors, *(name + SCALE for name in small)}
    assert all(torch.equal(made[name], tensors[name]) for name in tensors if name not in small)
    for name, tensor in made.items():
        entry = source.entries[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert entry.num_bytes == tensor.nbytes
    again = Quantised(Dictionary(made))
    assert all(torch.equal(again.read(n).float(), made[n].float()) for n in again.entries)


@pytest.mark.parametrize(
    "quantization",
    [
        "gptq",
        {"quant_method": "awq"},
        {"quant_method": "fp8"},
        {**QUANTIZATION, "weight_block_size": [64, 64]},
        {**QUANTIZATION, "fmt": "e5m2"},
        {**QUANTIZATION, "activation_scheme": "static"},
        [1],
    ],
    ids=str,
)
def test_any_other_quantization_is_refused(quantization):
    with pytest.raises(CheckpointError, match=r"quantization_config\.\w+ is"):
        check_quantization(quantization, "config.json")


def test_the_quantization_of_deepseek_is_followed():
    check_quantization(None, "config.json")
    check_quantization(QUANTIZATION, "config.json")
    check_quantization({**QUANTIZATION, "scale_fmt": "ue8m0"}, "config.json")


# --- The released layouts, from their configs alone ---

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "quantization_config": QUANTIZATION,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "ep_size": 1,
}


def stored(config: dict[str, Any], dtype: str) -> dict[str, Entry]:
    """What the files of a config hold."""
    cfg = read_config(config, "config.json")
    rules = family_of(HFConfig(config, "config.json")).rules(cfg, config)
    return dict(in_dtype(ModelSource(layout(cfg, rules)), dtype).entries)


def num_bytes(entries: dict[str, Entry], prefix: str = "") -> tuple[int, int]:
    found = [entry.num_bytes for name, entry in entries.items() if name.startswith(prefix)]
    return len(found), sum(found)


@pytest.fixture(scope="module")
def v3_files() -> dict[str, Entry]:
    return stored(DEEPSEEK_V3, "fp8")


def test_deepseek_v3s_files_follow_from_its_config(v3_files):
    assert num_bytes(v3_files) == (91_991, 688_574_839_360)
    mtp = num_bytes(v3_files, "model.layers.61.")
    assert mtp[0] == 1_564
    assert (91_991 - mtp[0], 688_574_839_360 - mtp[1]) == (90_427, 673_150_611_808)


def test_deepseek_v3s_tensors_have_their_published_types_and_shapes(v3_files):
    layer = "model.layers.61."
    want = {
        "self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), E4M3),
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": ((5, 56), torch.float32),
        "self_attn.q_a_layernorm.weight": ((1536,), torch.bfloat16),
        "self_attn.kv_b_proj.weight": ((32768, 512), E4M3),
        "mlp.gate.weight": ((256, 7168), torch.bfloat16),
        "mlp.gate.e_score_correction_bias": ((256,), torch.float32),
        "mlp.experts.255.down_proj.weight": ((7168, 2048), E4M3),
        "mlp.experts.255.down_proj.weight_scale_inv": ((56, 16), torch.float32),
        "mlp.shared_experts.up_proj.weight": ((2048, 7168), E4M3),
        "eh_proj.weight": ((7168, 14336), torch.bfloat16),
        "embed_tokens.weight": ((129280, 7168), torch.bfloat16),
        "shared_head.head.weight": ((129280, 7168), torch.bfloat16),
        "shared_head.norm.weight": ((7168,), torch.bfloat16),
    }
    for name, (shape, dtype) in want.items():
        assert (v3_files[layer + name].shape, v3_files[layer + name].dtype) == (shape, dtype), name
    kinds = Counter(entry.dtype for entry in v3_files.values())
    assert kinds[E4M3] == kinds[torch.float32] - 59  # a scale each; and 59 routing biases


V2_LITE = {
    **DEEPSEEK_V3,
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
V2 = {
    **V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
MOONLIGHT = {
    **DEEPSEEK_V3,
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
KIMI_K2 = {
    **DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}


@pytest.mark.parametrize(
    ("config", "count", "size"),
    [
        (V2_LITE, 5_291, 31_412_968_448),
        (V2, 29_102, 471_482_869_760),
        (MOONLIGHT, 5_317, 2 * 15_960_108_544 + 4 * 1_664),
        (KIMI_K2, 69_975, 2 * 1_026_408_209_408 + 4 * 23_040),
        ({**DEEPSEEK_V3, "num_nextn_predict_layers": 0}, 45_395, 2 * 671_026_404_352 + 4 * 14_848),
    ],
    ids=["v2-lite", "v2", "moonlight", "kimi-k2", "v3-main"],
)
def test_bfloat16_files_follow_from_their_configs(config, count, size):
    assert num_bytes(stored(config, "bfloat16")) == (count, size)
