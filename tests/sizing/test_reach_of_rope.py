"""RoPE's reach: the longest wavelength, its half, and what scalings make of them."""

import math
from dataclasses import replace

import pytest

from fathom.attention import MHAConfig, MLAConfig
from fathom.config import ModelConfig
from fathom.layers.position import DecoupledRopeConfig, NoPositionConfig, RopeConfig
from fathom.layers.rope import DynamicScaling, LinearScaling
from fathom.presets import preset
from fathom.sizing.reach import Reach, reach


def reach_of(cfg: ModelConfig, seq_len: int = 4096) -> Reach:
    result = reach(cfg, seq_len)
    assert result is not None
    return result


def with_position(position) -> ModelConfig:
    cfg = preset("tiny-llama")
    (group,) = cfg.groups
    attention = group.attention
    assert isinstance(attention, MHAConfig)
    changed = replace(group, attention=replace(attention, position=position))
    return replace(cfg, groups=(changed,))


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("llama-2-7b", 54_410),  # 1e4, 128 channels
        ("llama-3-8b", 2_559_195),  # 5e5, 128
        ("smollm2-135m", 438_460),  # 1e5, 64
        ("deepseek-v3", 47_117),  # 1e4, 64
        ("moonlight-16b-a3b", 224_031),  # 5e4, 64
    ],
)
def test_the_longest_wavelength_is_a_little_less_than_two_pi_theta(name, longest) -> None:
    got = reach_of(preset(name))
    assert got["longest_wavelength"] == pytest.approx(longest, rel=1e-5)
    assert got["half_wavelength"] == got["longest_wavelength"] / 2
    two_pi_theta = 2 * math.pi * got["theta"]
    dim = 2 * got["pairs"]
    assert got["longest_wavelength"] / two_pi_theta == pytest.approx(got["theta"] ** (-2 / dim))


@pytest.mark.parametrize(
    ("name", "first_unfinished", "pairs", "trained_len"),
    [
        ("llama-2-7b", 45.03, 64, 4096),
        ("llama-3-8b", 34.98, 64, 8192),
        ("deepseek-v3", 22.51, 32, 4096),
        ("moonlight-16b-a3b", 21.21, 32, 8192),
        ("kimi-k2", 19.16, 32, 4096),
    ],
)
def test_pairs_that_never_finish_a_turn_are_counted(
    name, first_unfinished, pairs, trained_len
) -> None:
    got = reach_of(preset(name))
    assert got["trained_len"] == trained_len
    assert got["pairs"] == pairs
    assert got["unfinished_pairs"] == pairs - math.ceil(first_unfinished)


def test_yarn_and_llama3_stretch_the_slowest_pair_by_their_factor() -> None:
    for name, factor in (("deepseek-v3", 40), ("llama-3-8b", 8), ("llama-3.2-1b", 32)):
        got = reach_of(preset(name))
        stretch = got["scaled_longest_wavelength"] / got["longest_wavelength"]
        assert stretch == pytest.approx(factor, rel=1e-4)
        assert got["scaled_half_wavelength"] == got["scaled_longest_wavelength"] / 2


def test_without_scaling_nothing_is_stretched() -> None:
    got = reach_of(preset("tiny-mla"))
    assert got["scaled_longest_wavelength"] == got["longest_wavelength"]
    assert got["trained_len"] == 512
    linear = reach_of(with_position(RopeConfig(scaling=LinearScaling(factor=3.0))))
    assert linear["scaled_longest_wavelength"] == pytest.approx(3 * linear["longest_wavelength"])


def test_dynamic_scaling_stretches_only_past_its_training() -> None:
    scaling = DynamicScaling(factor=4.0, original_seq_len=2048)
    cfg = with_position(RopeConfig(scaling=scaling))
    within, past = reach_of(cfg, 2048), reach_of(cfg, 8192)
    assert within["scaled_longest_wavelength"] == pytest.approx(within["longest_wavelength"])
    theta = 1e4 * 13 ** (32 / 30)
    assert past["scaled_longest_wavelength"] == pytest.approx(
        2 * math.pi * theta ** (30 / 32), rel=1e-4
    )


def test_a_decoupled_part_is_measured_by_its_own_width() -> None:
    got = reach_of(with_position(DecoupledRopeConfig(rope_head_dim=8)))
    assert got["pairs"] == 4
    assert got["longest_wavelength"] == pytest.approx(2 * math.pi * 1e4 ** (6 / 8))


def test_a_model_without_rope_has_no_reach() -> None:
    assert reach(with_position(NoPositionConfig()), 512) is None


def test_a_hybrids_reach_is_that_of_its_lowest_rope() -> None:
    bare, turned = with_position(NoPositionConfig()), preset("tiny-mla")
    assert isinstance(turned.groups[0].attention, MLAConfig)
    both = replace(bare, groups=(*bare.groups, *turned.groups))
    assert reach_of(both)["pairs"] == 8
