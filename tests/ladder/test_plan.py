"""What a budget buys, what is fitted to hold it, and which arms do not keep to it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fathom.ladder.plan import arm_differences, config_hash, fit_params, plan, train_flops_per_token
from fathom.model import build_model
from fathom.settings import ConfigError
from fathom.sizing.count import num_params

WIDER = 'arms.1.change=["model.groups.*.ffn.inter_dim=64"]'


def planned(study) -> dict:
    return {p.arm.name: p for p in plan(study)}


def test_equal_tokens_are_whole_steps_within_the_budget(make_study):
    arms = planned(make_study("budget.value=600"))
    assert {p.config.train.steps for p in arms.values()} == {4}
    assert {p.tokens for p in arms.values()} == {512}


def test_a_batch_ramp_counts_for_what_it_reads(make_study):
    ramp = ("train.ramp_from_tokens=32", "train.ramp_steps=3")
    arm = planned(make_study("budget.value=600", *ramp))["mha"]
    rows = [1, 2, 3, 4, 4, 4]  # of 32 tokens: a linear ramp to 128 tokens, then all of them
    assert arm.config.train.steps == len(rows)
    assert arm.tokens == 32 * sum(rows)


def test_equal_flops_give_a_cheaper_arm_more_tokens(make_study):
    hold = ('budget.hold="active_flops"', "budget.value=1e9", WIDER, "arms.1.fit=none")
    arms = planned(make_study(*hold))
    assert arms["mqa"].flops_per_token > arms["mha"].flops_per_token
    assert arms["mqa"].tokens < arms["mha"].tokens
    for p in arms.values():
        one_step = p.train_flops / p.config.train.steps
        assert 1e9 - one_step < p.train_flops <= 1e9


def test_equal_time_gives_steps_by_the_measured_step(make_study):
    study = make_study('budget.hold="wall_time"', "budget.value=10")
    steps = {p.arm.name: p.config.train.steps for p in plan(study, {"mha": 0.3, "mqa": 2.0})}
    assert steps == {"mha": 33, "mqa": 5, "moe": 1}  # moe: not measured yet


@pytest.mark.parametrize("hold", ["params", "cache_bytes"])
def test_an_arm_that_has_more_of_what_is_held_equal_is_refused(make_study, hold):
    with pytest.raises(ConfigError, match=r"arm (mqa|moe) has .* the first arm .* allows 1\.0%"):
        plan(make_study(f'budget.hold="{hold}"'))


def test_arms_within_the_tolerance_are_not_refused(make_study):
    study = make_study('budget.hold="params"', "budget.tolerance=0.9")
    assert len(plan(study)) == 3


def test_too_small_a_budget_says_how_many_steps_it_buys(make_study):
    with pytest.raises(ConfigError, match=r"arm mha: budget\.value buys 0 steps of 128 tokens"):
        plan(make_study("budget.value=100"))


def test_what_an_arm_cannot_be_is_told_with_its_name(make_study):
    with pytest.raises(ConfigError, match=r"arm mqa: .*n_heads must be a multiple of n_kv_heads"):
        plan(make_study('arms.1.change=["model.groups.*.attention.n_kv_heads=3"]'))


def test_the_vocabulary_is_the_datas_unless_given(make_study):
    assert planned(make_study())["mha"].config.model.vocab_size == 1024
    assert planned(make_study("model.vocab_size=2048"))["mha"].config.model.vocab_size == 2048


def test_a_preset_may_be_the_base(make_study):
    groups = make_study().model["groups"]
    study = make_study("model={preset = 'tiny-gqa'}", "arms.1.fit=none", "arms.2.parent=mqa")
    assert groups
    assert planned(study)["mqa"].config.model.groups[0].attention.n_kv_heads == 1


def test_fitting_brings_an_arm_to_within_half_a_unit_of_its_parent(make_study):
    arms = planned(make_study())
    one_unit = 2 * 3 * 16 * 8  # two layers, three matrices, dim 16, eight channels
    assert abs(arms["mqa"].params - arms["mha"].params) <= one_unit / 2
    assert arms["mqa"].config.model.groups[0].ffn.inter_dim % 8 == 0
    differing = arm_differences(list(arms.values()), dict.fromkeys(arms, 0.1), tuned=False)
    assert {d.key: d.mark for d in differing["mqa"]} == {
        "model.groups.*.attention.n_kv_heads": "named",
        "model.groups.*.ffn.inter_dim": "fit",
    }


@pytest.mark.parametrize("target", [19_000, 20_000, 123_456])
def test_fitting_comes_as_near_to_a_target_as_the_unit_allows(make_study, target):
    cfg = planned(make_study())["mha"].config
    fitted, keys = fit_params(cfg, target)
    assert keys == ("model.groups.0.ffn.inter_dim",)
    assert abs(num_params(fitted.model) - target) <= 2 * 3 * 16 * 8 / 2


def test_what_cannot_be_fitted_is_refused(make_study):
    with pytest.raises(ConfigError, match=r"arm moe: .*changes dense FFNs, and this arm has none"):
        plan(make_study('arms.2.fit="params"'))
    with pytest.raises(ConfigError, match="arm mqa: the change adds more parameters"):
        plan(make_study('arms.1.change=["model.groups.*.attention.head_dim=200"]'))


def test_the_hash_tells_what_is_learnt_and_not_how_it_is_watched(make_study):
    arms = planned(make_study())
    cfg = arms["mha"].run_config(1, 0.1)
    key = config_hash(cfg, "data")
    quieter = replace(cfg, train=replace(cfg.train, log_every=7, eval_every=3))
    assert config_hash(quieter, "data") == key
    others = [
        config_hash(cfg, "other data"),
        config_hash(arms["mha"].run_config(2, 0.1), "data"),
        config_hash(arms["mha"].run_config(1, 0.2), "data"),
        config_hash(arms["mqa"].run_config(1, 0.1), "data"),
        config_hash(replace(cfg, train=replace(cfg.train, steps=5)), "data"),
    ]
    assert len({key, *others}) == 6


def test_training_flops_are_those_that_torch_counts_with_mtp(make_study):
    mtp = 'arms.1.change=["model.mtp={n_mtp_modules = 2}"]'
    cfg = planned(make_study(mtp, "arms.1.fit=none"))["mqa"].config
    model = build_model(cfg.model, seed=0)
    tokens = torch.arange(33)[None]
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.loss(tokens[:, :-1], tokens[:, 1:])
    ours = train_flops_per_token(cfg.model, 32) / 3 * 32
    assert counted.get_total_flops() == pytest.approx(ours, rel=0.06)  # deeper modules are shorter


def test_differences_show_a_rate_that_was_tuned_and_flag_one_that_was_not(make_study):
    arms = plan(make_study())
    rates = {"mha": 0.1, "mqa": 0.2, "moe": 0.1}
    for tuned, mark in ((True, "tuned"), (False, "extra")):
        found = arm_differences(arms, rates, tuned=tuned)
        assert ("train.lr", mark) in [(d.key, d.mark) for d in found["mqa"]]
        assert "train.lr" not in [d.key for d in found["moe"]]
        assert found["mha"] == []


def test_no_arm_skips_a_step_unless_the_study_says_so(make_study):
    assert {p.config.train.spike_sigmas for p in plan(make_study())} == {0}
    guarded = plan(make_study("train.spike_sigmas=6"))
    assert {p.config.train.spike_sigmas for p in guarded} == {6}
