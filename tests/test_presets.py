"""The named models: published shapes to the last parameter, and a dial that keeps its rules."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fathom.attention import MHAConfig, MLAConfig
from fathom.config import ModelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.layers.rope import Llama3Scaling, YarnScaling
from fathom.model import build_model
from fathom.presets import PRESETS, preset, sized
from fathom.settings import ConfigError, parse, to_data
from fathom.sizing.count import flops_per_token, num_mtp_params, num_params

# name: parameters, layers, context, norm_eps, KV numbers per token (config.json and file headers)
PUBLISHED = {
    "smollm2-135m": (134_515_008, 30, 8192, 1e-5, 11_520),
    "llama-2-7b": (6_738_415_616, 32, 4096, 1e-5, 262_144),
    "llama-3-8b": (8_030_261_248, 32, 131072, 1e-5, 65_536),
    "llama-3.2-1b": (1_235_814_400, 16, 131072, 1e-5, 16_384),
    "deepseek-moe-16b": (16_375_728_128, 28, 4096, 1e-6, 114_688),
    "deepseek-v2-lite": (15_706_484_224, 27, 163840, 1e-6, 15_552),
    "deepseek-v2": (235_741_434_880, 60, 163840, 1e-6, 34_560),
    "deepseek-v3": (671_026_404_352, 61, 163840, 1e-6, 35_136),
    "deepseek-v3.2": (671_877_929_216, 61, 163840, 1e-6, 35_136 + 61 * 128),
    "moonlight-16b-a3b": (15_960_108_544, 27, 8192, 1e-5, 15_552),
    "kimi-k2": (1_026_408_209_408, 61, 131072, 1e-6, 35_136),
}


FEW_BLOCKS = {
    "moba": {"block_size": 4, "topk_blocks": 2},
    "nsa": {"cmp_block_size": 4, "cmp_stride": 2, "block_size": 4, "topk_blocks": 3},
}


def shrunken(cfg: ModelConfig) -> ModelConfig:
    """The same parts with small numbers: groups, ratios and switches stay."""
    data = to_data(cfg) | {"vocab_size": 64, "dim": 32, "max_seq_len": 32}
    for group in data["groups"]:
        group["count"] = 1
        attention, ffn = group["attention"], group["ffn"]
        if "n_kv_heads" in attention:
            share = attention["n_heads"] // attention["n_kv_heads"]
            attention |= {"n_heads": 2 * share, "n_kv_heads": 2, "head_dim": 8}
            attention |= FEW_BLOCKS.get(attention["kind"], {})
        else:
            attention |= {"n_heads": 2, "kv_lora_rank": 16, "v_head_dim": 8}
            attention |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
            attention |= {"q_lora_rank": 12} if "q_lora_rank" in attention else {}
            if attention["kind"] == "dsa":
                attention |= {"index_n_heads": 4, "index_head_dim": 8, "index_topk": 5}
        ffn["inter_dim"] = 16
        if ffn["kind"] == "moe":
            ffn |= {"n_routed_experts": 4 * ffn["n_expert_groups"], "top_k": 3}
    return parse(ModelConfig, data)


def attention_of(cfg: ModelConfig) -> MHAConfig | MLAConfig:
    attention = cfg.groups[0].attention
    assert isinstance(attention, MHAConfig | MLAConfig)
    return attention


def experts_of(cfg: ModelConfig) -> MoEConfig:
    experts = cfg.groups[-1].ffn
    assert isinstance(experts, MoEConfig)
    return experts


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_its_published_size(name: str) -> None:
    params, layers, context, eps, kv_numbers = PUBLISHED[name]
    cfg = preset(name)
    assert num_params(cfg) == params
    assert cfg.n_layers == layers
    assert cfg.max_seq_len == context
    assert cfg.norm_eps == eps
    widths = [s.width for layer in cfg.layers() for s in layer.attention.streams()]
    assert sum(widths) == kv_numbers


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_being_written_and_read(name: str) -> None:
    cfg = preset(name)
    assert parse(ModelConfig, to_data(cfg)) == cfg


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_shrunken_forward_and_backward(name: str) -> None:
    cfg = shrunken(preset(name))
    model = build_model(cfg, seed=0)
    tokens_BT = torch.arange(24).view(2, 12)
    losses = model.loss(tokens_BT, tokens_BT.roll(-1, dims=1))
    losses.total.backward()
    assert losses.main.item() == pytest.approx(math.log(64), rel=0.1)
    assert (losses.mtp.item() > 0) == (cfg.mtp is not None)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_rope_bases_and_scalings_are_the_published_ones() -> None:
    thetas = {
        "smollm2-135m": 1e5,
        "llama-2-7b": 1e4,
        "llama-3-8b": 5e5,
        "deepseek-v3": 1e4,
        "moonlight-16b-a3b": 5e4,
        "kimi-k2": 5e4,
    }
    for name, theta in thetas.items():
        assert attention_of(preset(name)).position.theta == theta, name
    for name, factor in (("llama-3-8b", 8), ("llama-3.2-1b", 32)):
        scaling = attention_of(preset(name)).position.scaling
        assert scaling == Llama3Scaling(factor=factor, original_seq_len=8192)
    yarns = {
        "deepseek-v2-lite": (40, 32, 0.707),
        "deepseek-v2": (40, 32, 0.707),
        "deepseek-v3": (40, 32, 1.0),
        "kimi-k2": (32, 1, 1.0),
    }
    for name, (factor, beta_fast, mscale) in yarns.items():
        assert attention_of(preset(name)).position.scaling == YarnScaling(
            factor=factor,
            original_seq_len=4096,
            beta_fast=beta_fast,
            mscale=mscale,
            mscale_all_dim=mscale,
        )
    assert attention_of(preset("moonlight-16b-a3b")).position.scaling is None


def test_v2_and_v3_route_by_their_own_rules() -> None:
    v2, v3 = experts_of(preset("deepseek-v2")), experts_of(preset("deepseek-v3"))
    assert (v2.score_func, v2.group_score, v2.norm_topk_prob) == ("softmax", "max", False)
    assert (v3.score_func, v3.group_score, v3.norm_topk_prob) == ("sigmoid", "top2", True)
    assert (v2.n_expert_groups, v2.n_limited_groups, v2.route_scale) == (8, 3, 16.0)
    assert (v3.n_expert_groups, v3.n_limited_groups, v3.route_scale) == (8, 4, 2.5)
    assert [kind.kind for kind in v3.balance] == ["aux_loss_free", "seq_aux_loss"]
    assert experts_of(preset("moonlight-16b-a3b")).route_scale == 2.446
    assert experts_of(preset("kimi-k2")).route_scale == 2.827
    assert experts_of(preset("deepseek-v2-lite")).route_scale == 1.0


def test_only_v3_of_the_published_shapes_predicts_further_ahead() -> None:
    v3 = ["deepseek-v3", "deepseek-v3.2"]
    assert num_mtp_params(preset("deepseek-v3")) == 11_610_067_968
    assert [name for name in PUBLISHED if preset(name).mtp is not None] == v3


def test_tied_heads_are_those_of_the_small_llamas() -> None:
    tied = {name for name in PUBLISHED if preset(name).tie_embeddings}
    assert tied == {"smollm2-135m", "llama-3.2-1b"}


def test_tiny_presets_are_one_change_apart() -> None:
    llama, gqa, mla, moe = (preset(f"tiny-{part}") for part in ("llama", "gqa", "mla", "moe"))
    (group,) = llama.groups
    assert gqa == replace(llama, groups=(replace(group, attention=attention_of(gqa)),))
    assert mla == replace(llama, groups=(replace(group, attention=attention_of(mla)),))
    assert moe == replace(llama, groups=(replace(group, ffn=experts_of(moe)),))
    for cfg in (llama, gqa, mla, moe, preset("tiny-deepseek")):
        assert (cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.max_seq_len) == (1024, 128, 4, 512)


def test_tiny_moe_costs_what_its_dense_twin_costs_but_for_the_router() -> None:
    dense, moe = preset("tiny-llama"), preset("tiny-moe")
    router = 2 * moe.dim * experts_of(moe).n_routed_experts * moe.n_layers
    assert flops_per_token(moe, 512) - flops_per_token(dense, 512) == router


def test_tiny_deepseek_has_every_part_of_the_lineage() -> None:
    cfg = preset("tiny-deepseek")
    assert all(isinstance(layer.attention, MLAConfig) for layer in cfg.layers())
    assert isinstance(cfg.groups[0].ffn, DenseConfig)
    assert cfg.groups[0].count == 1
    assert experts_of(cfg).n_shared_experts == 1
    assert cfg.mtp is not None


@pytest.mark.parametrize("family", ["llama", "deepseek"])
@pytest.mark.parametrize("params", [10**7, 3 * 10**7, 10**8, 10**9, 7 * 10**9])
def test_the_dial_comes_near_the_asked_size(family, params) -> None:
    cfg = sized(family, params)
    assert num_params(cfg) == pytest.approx(params, rel=0.2)
    attention = attention_of(cfg)
    head_dim = attention.head_dim if isinstance(attention, MHAConfig) else attention.v_head_dim
    assert attention.n_heads * head_dim == cfg.dim
    assert cfg.dim / cfg.n_layers <= 96


def test_the_dial_never_turns_backwards() -> None:
    for family in ("llama", "deepseek"):
        counts = [num_params(sized(family, n * 10**6)) for n in range(10, 190, 12)]
        assert all(small <= large for small, large in pairwise(counts))


def test_the_dial_gives_a_deepseek_the_llamas_ffn_width_per_token() -> None:
    cfg = sized("deepseek", 10**8)
    dense, experts = cfg.groups[0].ffn, experts_of(cfg)
    assert isinstance(dense, DenseConfig)
    read = experts.top_k + experts.n_shared_experts
    assert read * experts.inter_dim == dense.inter_dim


def test_a_size_in_the_name_turns_the_dial() -> None:
    assert preset("llama-35m") == sized("llama", 35_000_000)
    assert preset("deepseek-1.5b") == sized("deepseek", 1_500_000_000)
    assert preset("llama-20m") == sized("llama", 20_000_000)


def test_the_dial_takes_a_users_vocabulary() -> None:
    cfg = sized("llama", 50_000_000, vocab_size=16000)
    assert cfg.vocab_size == 16000
    assert num_params(cfg) == pytest.approx(50_000_000, rel=0.1)


@pytest.mark.parametrize("params", [0, -5, 1000, 10**15])
def test_a_size_that_cannot_be_is_refused_with_the_nearest(params: int) -> None:
    with pytest.raises(ConfigError, match=r"the nearest has [\d,]+"):
        sized("llama", params)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be llama or deepseek, got 'mamba'"):
        sized("mamba", 10**7)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("deepseekv3", "deepseek-v3"), ("tiny-lama", "tiny-llama")]
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong!r}: did you mean {nearest!r}"):
        preset(wrong)


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ConfigError, match="the presets are tiny-llama, "):
        preset("xyzzy")
