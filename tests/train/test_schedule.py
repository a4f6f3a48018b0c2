"""Learning rate and batch size as functions of the step."""

import math
from itertools import pairwise

import pytest

from fathom.train.config import TrainConfig
from fathom.train.schedule import lr_factor, rows_at


def factors(**fields: object) -> list[float]:
    cfg = TrainConfig(**fields)  # pyright: ignore[reportArgumentType]
    return [lr_factor(cfg, step) for step in range(cfg.steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd", "deepseek_v3", "multi_step"])
def test_warm_up_rises_linearly_to_the_whole_rate(schedule):
    rates = factors(steps=1000, warmup_steps=4, schedule=schedule)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-4)
    assert min(rates) > 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "deepseek_v3", "multi_step"])
def test_after_the_warm_up_no_rate_rises(schedule):
    rates = factors(steps=333, warmup_steps=10, schedule=schedule)[10:]
    assert all(a >= b for a, b in pairwise(rates))
    assert rates[-1] < 0.15


def test_cosine_is_half_way_in_the_middle_and_ends_near_the_lowest_rate():
    rates = factors(steps=1010, warmup_steps=10, schedule="cosine", min_lr_ratio=0.2)
    assert rates[510] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2, abs=1e-4)


def test_wsd_stays_until_its_last_share_and_falls_linearly():
    rates = factors(steps=100, schedule="wsd", decay_share=0.2, min_lr_ratio=0.0)
    assert rates[:81] == [1.0] * 81
    assert rates[90] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 20)


def test_wsd_without_a_decay_is_constant():
    assert factors(steps=10, schedule="wsd", decay_share=0.0) == [1.0] * 10


def test_deepseek_v3_is_flat_then_cosine_then_two_constant_tails():
    rates = factors(steps=14800, schedule="deepseek_v3")  # a step is 1 G tokens of its 14.8 T
    assert set(rates[:10000]) == {1.0}
    assert rates[10000 + 2150] == pytest.approx(0.55, abs=1e-3)
    assert set(rates[14300:14633]) == {0.1}
    assert set(rates[14633:]) == {7.3e-6 / 2.2e-4}


def test_multi_step_falls_by_0_316_at_80_and_at_90_percent():
    rates = factors(steps=100, schedule="multi_step")
    assert set(rates[:80]) == {1.0}
    assert set(rates[80:90]) == {0.316}
    assert rates[90:] == pytest.approx([0.1] * 10, rel=2e-3)


def test_a_warm_up_of_all_steps_is_allowed():
    assert factors(steps=3, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1])


def test_without_a_ramp_every_step_has_all_rows(make_config):
    cfg = make_config()
    assert {rows_at(cfg, step) for step in range(100)} == {4}


@pytest.mark.parametrize("micro", [None, 2])
def test_the_batch_grows_through_the_ramp_by_whole_micro_batches(make_config, micro):
    cfg = make_config(
        *("train.ramp_from_tokens=64", "train.tokens_per_step=512", "train.ramp_steps=10"),
        f"train.micro_batch_size={micro}",
    )
    rows = [rows_at(cfg, step) for step in range(12)]
    assert rows[0] == 2
    assert rows[10:] == [16, 16]
    assert rows == sorted(rows)
    assert all(row % (micro or 1) == 0 for row in rows)
    expected = [2 + 14 * step / 10 for step in range(10)]
    assert all(math.isclose(a, b, abs_tol=micro or 1) for a, b in zip(rows, expected, strict=False))
