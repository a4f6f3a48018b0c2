"""RoPE's frequencies against published values (DeepSeek V2/V3, Kimi-K2, Llama 3.1 and 3.2)."""

import math

import pytest
import torch

from fathom.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
)
from fathom.ops.rope import rotate

DEEPSEEK = {"factor": 40.0, "original_seq_len": 4096}


def yarn(**changes) -> YarnScaling:
    return YarnScaling(**{**DEEPSEEK, **changes})


def test_deepseek_yarn_frequencies_are_the_published_ones():
    inv_freq = Rope(64, 10000.0, yarn()).frequencies(total=1)
    want = {0: 1.0, 1: 0.7498942, 10: 0.05623413, 11: 0.03900693, 16: 0.0055, 17: 0.003561997}
    want |= {20: 7.905694e-4, 21: 4.149904e-4, 22: 1.778279e-4, 23: 3.333804e-5, 31: 3.333804e-6}
    for pair, value in want.items():
        assert inv_freq[pair].item() == pytest.approx(value, rel=1e-5)
    assert inv_freq.sum().item() == pytest.approx(3.94893627, rel=1e-6)


def test_deepseek_yarn_blends_pairs_10_to_23():
    assert yarn().correction_range(64, 10000.0) == (10, 23)
    low, high = yarn(truncate=False).correction_range(64, 10000.0)
    assert (low, high) == (pytest.approx(10.4722, abs=1e-4), pytest.approx(22.5134, abs=1e-4))


@pytest.mark.parametrize(("factor", "total"), [(32.0, 3.48176241), (64.0, 3.48170051)])
def test_kimi_k2_yarn_is_a_step_at_pair_20(factor, total):
    scaling = yarn(factor=factor, beta_fast=1.0, beta_slow=1.0)
    assert scaling.correction_range(64, 50000.0) == (19, 20)
    inv_freq = Rope(64, 50000.0, scaling).frequencies(total=1)
    assert inv_freq.sum().item() == pytest.approx(total, rel=1e-6)


def test_equal_yarn_bounds_do_not_divide_by_zero():
    scaling = yarn(beta_fast=1.0, beta_slow=1.0, truncate=False)
    low, high = scaling.correction_range(64, 10000.0)
    assert high == low + 0.001
    assert torch.isfinite(Rope(64, 10000.0, scaling).frequencies(1)).all()


@pytest.mark.parametrize(
    ("dim", "factor", "total", "last"),
    [(128, 8.0, 5.38605826, 3.06892588e-07), (64, 32.0, 2.9682024, 9.41830649e-08)],
    ids=["llama-3.1-8b", "llama-3.2-1b"],
)
def test_llama3_frequencies_are_the_published_ones(dim, factor, total, last):
    scaling = Llama3Scaling(factor=factor, original_seq_len=8192)
    inv_freq = Rope(dim, 500000.0, scaling).frequencies(total=1)
    assert inv_freq.sum().item() == pytest.approx(total, rel=1e-6)
    assert inv_freq[-1].item() == pytest.approx(last, rel=1e-6)


def test_llama3_divides_29_blends_6_and_keeps_29_pairs_of_llama_3_1_8b():
    plain = Rope(128, 500000.0).frequencies(total=1)
    scaling = Llama3Scaling(factor=8.0, original_seq_len=8192)
    ratio = plain / Rope(128, 500000.0, scaling).frequencies(total=1)
    assert (ratio < 1.0001).sum() == 29
    assert (ratio > 7.999).sum() == 29


@pytest.mark.parametrize(
    ("mscale", "factor", "softmax_scale"),
    [(1.0, 40.0, 0.13523378), (0.707, 40.0, 0.11472139), (1.0, 32.0, 0.13086080)],
)
def test_softmax_correction_under_yarn_is_deepseeks(mscale, factor, softmax_scale):
    scaling = yarn(factor=factor, mscale=mscale, mscale_all_dim=mscale)
    assert 192**-0.5 * scaling.softmax_factor == pytest.approx(softmax_scale, rel=1e-6)
    assert scaling.attention_factor == 1.0


def test_yarn_without_mscale_puts_its_factor_on_cos_and_sin():
    assert yarn().attention_factor == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn().softmax_factor == 1.0
    assert yarn(explicit_attention_factor=0.5).attention_factor == 0.5


def test_dynamic_scaling_grows_theta_past_the_original_length_only():
    scaling = DynamicScaling(factor=4.0, original_seq_len=2048)
    rope = Rope(64, 10000.0, scaling)
    assert torch.equal(rope.frequencies(2048), Rope(64, 10000.0).frequencies(1))
    grown = Rope(64, 141213.757).frequencies(1)
    torch.testing.assert_close(rope.frequencies(8192), grown, rtol=1e-5, atol=0)


def test_linear_scaling_divides_every_frequency():
    scaled = Rope(8, 100.0, LinearScaling(factor=4.0)).frequencies(1)
    torch.testing.assert_close(scaled * 4, Rope(8, 100.0).frequencies(1))


def test_a_score_depends_on_the_distance_alone():
    rope = Rope(16, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> float:
        turned = [
            rotate(x, *rope.angles(torch.tensor([[place]]), 1))
            for x, place in ((q, query_at), (k, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LinearScaling(factor=0.5), "factor"),
        (lambda: Llama3Scaling(factor=8.0, original_seq_len=1, low_freq_factor=4.0), "high_freq"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused_by_name(make, word):
    with pytest.raises(ValueError, match=word):
        make()
