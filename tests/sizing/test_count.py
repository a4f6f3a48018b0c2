"""Counts from the config alone, against built models, torch's counter and published figures."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fathom
from fathom.attention import AttentionConfig, MHAConfig, MLAConfig
from fathom.config import LayerGroup, ModelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.layers.position import (
    AlibiConfig,
    DecoupledRopeConfig,
    NoPositionConfig,
    RopeConfig,
)
from fathom.model import build_model
from fathom.presets import preset
from fathom.sizing import count

# name: active parameters without the embedding table (each label's own convention is close to it)
ACTIVE_WITHOUT_TABLE = {
    "deepseek-moe-16b": 2_618_935_296,
    "deepseek-v2-lite": 2_451_435_008,
    "deepseek-v2": 20_851_512_320,
    "deepseek-v3": 36_625_603_584,
    "moonlight-16b-a3b": 2_579_230_208,
    "kimi-k2": 31_687_072_768,
}
TINY = ["tiny-llama", "tiny-gqa", "tiny-mla", "tiny-moe", "tiny-deepseek"]


def mha(**changes) -> MHAConfig:
    values = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "position": RopeConfig()}
    return MHAConfig(**values | changes)


def mla(**changes) -> MLAConfig:
    values = {"n_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6}
    return MLAConfig(**values | {"v_head_dim": 14, "position": RopeConfig()} | changes)


ATTENTIONS = {
    "gqa": mha(),
    "mqa": mha(n_kv_heads=1),
    "shared-query": mha(shared_query=True, n_kv_heads=6),
    "biased": mha(qkv_bias=True, out_bias=True),
    "decoupled-rope": mha(position=DecoupledRopeConfig(rope_head_dim=8)),
    "alibi": mha(position=AlibiConfig()),
    "no-position": mha(position=NoPositionConfig()),
    "mla": mla(),
    "mla-compressed-query": mla(q_lora_rank=24, bias=True),
}
FFNS = {
    "dense": DenseConfig(inter_dim=52),
    "dense-biased": DenseConfig(inter_dim=52, bias=True),
    "moe": MoEConfig(inter_dim=20, n_routed_experts=6, top_k=2),
    "moe-shared": MoEConfig(inter_dim=20, n_routed_experts=6, top_k=2, n_shared_experts=2),
}


def model_of(attention: AttentionConfig = ATTENTIONS["gqa"], ffn=FFNS["dense"]) -> ModelConfig:
    return ModelConfig(
        vocab_size=101,
        dim=44,
        groups=(LayerGroup(count=2, attention=attention, ffn=ffn),),
        max_seq_len=64,
    )


KINDS = {
    **{name: model_of(attention=attention) for name, attention in ATTENTIONS.items()},
    **{name: model_of(ffn=ffn) for name, ffn in FFNS.items()},
    **{name: preset(name) for name in TINY},
    "tied": replace(model_of(), tie_embeddings=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    cfg = KINDS[name]
    built = {key: p.numel() for key, p in build_model(cfg, seed=0).named_parameters()}
    mtp = sum(n for key, n in built.items() if "mtp" in key)
    assert count.num_params(cfg) == sum(built.values()) - mtp
    assert count.num_mtp_params(cfg) == mtp


@pytest.mark.parametrize("name", ["llama-3.2-1b", "deepseek-moe-16b", "deepseek-v2", "deepseek-v3"])
def test_parameters_of_published_shapes_are_those_of_their_modules(name: str) -> None:
    cfg = preset(name)
    model = fathom.build(cfg, device="meta")
    main = sum(p.numel() for key, p in model.named_parameters() if "mtp" not in key)
    assert count.num_params(cfg) == main


@pytest.mark.parametrize("name", KINDS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    cfg, tokens_BT = KINDS[name], torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(cfg, seed=0)(tokens_BT)
    per_token = counter.get_total_flops() / tokens_BT.numel()
    assert count.flops_per_token(cfg, 16) == pytest.approx(per_token, rel=0.01)


@pytest.mark.parametrize("name", KINDS)
def test_cache_bytes_are_those_that_a_cache_holds(name: str) -> None:
    cfg = KINDS[name]
    model = build_model(cfg, seed=0)
    for length in (1, 33):
        held = model.new_cache(1, length, dtype=torch.bfloat16).num_bytes
        assert count.cache_bytes(cfg, length) == held
    assert count.cache_bytes(cfg, 33) == 33 * count.cache_bytes_per_token(cfg)


@pytest.mark.parametrize("name", ACTIVE_WITHOUT_TABLE)
def test_active_parameters_are_the_published_ones_and_one_row(name: str) -> None:
    cfg = preset(name)
    assert count.num_active_params(cfg) == ACTIVE_WITHOUT_TABLE[name] + cfg.dim


def test_a_tied_table_is_read_whole_as_the_head() -> None:
    cfg = preset("smollm2-135m")
    assert count.num_active_params(cfg) == count.num_params(cfg)
    untied = replace(cfg, tie_embeddings=False)
    assert count.num_params(untied) - count.num_params(cfg) == cfg.vocab_size * cfg.dim
    assert count.num_active_params(untied) == count.num_active_params(cfg) + cfg.dim


def test_mtp_modules_are_counted_each_and_apart() -> None:
    cfg = preset("tiny-deepseek")
    assert cfg.mtp is not None
    two = replace(cfg, mtp=replace(cfg.mtp, n_mtp_modules=2))
    assert count.num_mtp_params(two) == 2 * count.num_mtp_params(cfg)
    assert count.num_params(two) == count.num_params(replace(cfg, mtp=None))
    assert count.num_mtp_params(replace(cfg, mtp=None)) == 0


def test_causal_flops_halve_the_scores_alone() -> None:
    cfg = preset("tiny-llama")
    fixed = 2 * count.flops_per_token(cfg, 1) - count.flops_per_token(cfg, 2)
    scores = count.flops_per_token(cfg, 512) - fixed
    causal = count.mean_causal_flops_per_token(cfg, 512)
    assert causal == pytest.approx(fixed + scores * 513 / 1024)
    assert count.mean_causal_flops_per_token(cfg, 1) == count.flops_per_token(cfg, 1)


def test_a_window_caps_scores_and_cache() -> None:
    windowed, whole = model_of(mha(window_size=8)), model_of(mha())
    assert count.flops_per_token(windowed, 64) == count.flops_per_token(whole, 8)
    assert count.cache_bytes(windowed, 64) == count.cache_bytes(whole, 8)
    assert count.cache_bytes_per_token(windowed) == count.cache_bytes_per_token(whole)
    first_8 = count.mean_causal_flops_per_token(whole, 8)
    rest = count.flops_per_token(whole, 8)
    mean = (8 * first_8 + 56 * rest) / 64
    assert count.mean_causal_flops_per_token(windowed, 64) == pytest.approx(mean)


def test_groups_add_up() -> None:
    dense, moe = model_of(ffn=FFNS["dense"]), model_of(ffn=FFNS["moe"])
    both = replace(dense, groups=(*dense.groups, *moe.groups))
    ends = 2 * dense.vocab_size * dense.dim + dense.dim
    assert count.num_params(both) == count.num_params(dense) + count.num_params(moe) - ends
    assert count.cache_bytes(both, 7) == 2 * count.cache_bytes(dense, 7)


def test_a_mla_caches_what_a_gqa_of_two_and_a_quarter_groups_would() -> None:
    v3 = preset("deepseek-v3")
    assert count.cache_bytes_per_token(v3) == 70_272
    per_group = 2 * 128 * 2 * v3.n_layers  # keys and values, bf16
    assert count.cache_bytes_per_token(v3) / per_group == 2.25


@pytest.mark.parametrize(
    ("shape", "sequences_tflops"),
    [
        ({"n_layers": 30, "dim": 4096, "vocab_size": 102400}, 183.48),
        ({"n_layers": 32, "dim": 4096, "vocab_size": 32000}, 187.94),
        ({"n_layers": 95, "dim": 8192, "vocab_size": 102400}, 2057.46),
        ({"n_layers": 28, "dim": 2048, "vocab_size": 102400, "ffn_equivalents": 2}, 74.42),
    ],
    ids=["deepseek-7b", "llama-2-7b", "deepseek-67b", "deepseek-moe-16b"],
)
def test_the_papers_training_flops_come_out(shape, sequences_tflops: float) -> None:
    flops = count.deepseek_training_flops(seq_len=4096, **shape)
    assert math.isclose(flops / 1e12, sequences_tflops, rel_tol=1e-4)


def test_counting_the_largest_model_makes_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made")

    for maker in ("empty", "zeros", "tensor", "arange"):
        monkeypatch.setattr(torch, maker, refuse)
    cfg = preset("kimi-k2")
    assert count.num_params(cfg) == 1_026_408_209_408
    assert count.flops_per_token(cfg, 4096) > 0
    assert count.cache_bytes(cfg, 131072) == 70_272 * 131072
