"""The promise: at most 5 % of studies show a false difference, and a verdict says what it rests on.

Whole studies are simulated at once, as arrays [studies, arms, seeds]; their seeds are fixed, so a
share is the same number in every run, with a standard error of 0.35 % at 4000 studies.
"""

import math

import numpy as np
import pytest

from fathom.ladder.verdict import (
    DocumentLosses,
    bootstrap_interval,
    detectable_delta,
    digamma,
    estimate_prior,
    holm,
    judge,
    standard_error,
    student_t_quantile,
    student_t_two_sided,
    trigamma,
    trigamma_inverse,
    typical_spread,
)

STUDIES = 4000
FALSE_AT_MOST = 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)


def study(seed=0, effects=(0.0, -0.3, 0.3, 0.0), n_seeds=3, noise=0.01):
    """Arms a, b, ... against one root, with these true differences."""
    rng = np.random.default_rng(seed)
    root = 2 + noise * rng.standard_normal(n_seeds)
    names = "abcdefghijklmnopqrst"
    return {
        names[i]: (list(2 + effect + noise * rng.standard_normal(n_seeds)), list(root))
        for i, effect in enumerate(effects)
    }


def null_differences(n_arms, n_seeds, noise, parents, studies=STUDIES):
    rng = np.random.default_rng([n_arms, n_seeds, len(noise), len(parents)])
    shape = (studies, n_arms + 1, n_seeds)
    losses = rng.standard_t(4, shape) if noise == "heavy" else rng.standard_normal(shape)
    if noise == "unequal":  # each run's standard deviation is log-uniform over a factor of 4
        losses *= 4 ** rng.uniform(0, 1, (*shape[:2], 1))
    return losses[:, 1:] - (losses[:, :1] if parents == "root" else losses[:, :-1])


def p_values(delta_SAN):
    error, df = standard_error(delta_SAN.var(axis=-1, ddof=1), delta_SAN.shape[-1])
    return student_t_two_sided(delta_SAN.mean(axis=-1) / error, df)


def found(delta_SAN):
    return holm(p_values(delta_SAN), 0.05)[0] <= 0.05


# What the verdicts promise, on studies with known answers.


@pytest.mark.parametrize("parents", ["root", "chain"])
@pytest.mark.parametrize("noise", ["equal", "unequal", "heavy"])
@pytest.mark.parametrize(("n_arms", "n_seeds"), [(1, 3), (2, 3), (4, 3), (10, 3), (20, 3), (10, 5)])
def test_at_most_5_percent_of_studies_show_a_false_difference(n_arms, n_seeds, noise, parents):
    delta = null_differences(n_arms, n_seeds, noise, parents)
    assert found(delta).any(axis=-1).mean() <= FALSE_AT_MOST


def test_one_arm_alone_is_wrong_in_exactly_5_percent():
    assert found(null_differences(1, 3, "equal", "root", 40_000)).mean() == pytest.approx(
        0.05, abs=0.0033
    )


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_true_differences_elsewhere_do_not_loosen_the_promise(n_seeds):
    delta = null_differences(10, n_seeds, "unequal", "root")
    delta[:, 5:] += 1000.0
    hits = found(delta)
    assert hits[:, 5:].all()
    assert hits[:, :5].any(axis=-1).mean() <= FALSE_AT_MOST


def test_an_arm_three_times_as_noisy_as_the_others_is_not_excused():
    delta = null_differences(10, 3, "equal", "root")
    delta[:, 0] *= 3
    assert found(delta)[:, 0].mean() <= 0.05


@pytest.mark.parametrize("noise", ["equal", "unequal"])
def test_all_intervals_of_a_study_hold_together(noise):
    delta = null_differences(10, 3, noise, "root", 800)
    true = np.random.default_rng(1).choice([0.0, 4.0, 20.0], delta.shape[:2])
    delta = delta + true[..., None]
    error, df = standard_error(delta.var(axis=-1, ddof=1), 3)
    mean = delta.mean(axis=-1)
    _, level = holm(student_t_two_sided(mean / error, df), 0.05)
    half = student_t_quantile(level, df) * error
    assert (np.abs(mean - true) > half).any(axis=-1).mean() <= 0.05


@pytest.mark.parametrize(("n_seeds", "n_arms"), [(3, 1), (3, 10), (5, 10)])
def test_the_detectable_difference_is_found_four_times_in_five(n_seeds, n_arms):
    spread = 0.02
    delta = null_differences(n_arms, n_seeds, "equal", "root") * (spread / math.sqrt(2))
    edge = detectable_delta(spread, n_seeds=n_seeds, n_arms=n_arms)
    delta[:, -1] -= edge
    assert found(delta)[:, -1].mean() == pytest.approx(0.8, abs=0.025)


def test_ten_arms_with_three_seeds_see_a_third_of_what_a_paired_t_needs():
    paired = student_t_quantile(0.05 / 10, 2) / math.sqrt(3)  # at even odds, in units of the spread
    edge = detectable_delta(1.0, n_seeds=3, n_arms=10)
    assert edge == pytest.approx(3.58, abs=0.1)  # the recorded figures of benchmarks/
    assert edge < paired / 2
    assert detectable_delta(1.0, n_seeds=5, n_arms=10) == pytest.approx(2.28, abs=0.07)
    assert detectable_delta(1.0, n_seeds=2, n_arms=10) is None


# Small cases by hand.


def test_one_arm_is_the_paired_t_test_by_hand():
    # Differences -0.02, -0.03, -0.04: mean -0.03, error 0.01 / sqrt(3), t^2 = 27, and with two
    # degrees of freedom p = 1 - t / sqrt(t^2 + 2); t(0.975, 2) = 4.302653.
    verdict = judge({"mla": ([1.98, 2.07, 1.86], [2.0, 2.1, 1.9])}, margin=0.01)["mla"]
    assert verdict.verdict == "better"
    assert verdict.n == 3
    assert verdict.delta_bpb == pytest.approx(-0.03)
    assert verdict.p_value == pytest.approx(1 - math.sqrt(27 / 29))
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert verdict.interval == pytest.approx((-0.03 - half, -0.03 + half), abs=1e-7)


def test_two_arms_of_equal_variance_borrow_half_a_degree_of_freedom():
    # log s^2 is biased by digamma(1) = -0.5772 with two degrees of freedom: the prior's scale is
    # s^2 * exp(0.5772) and its weight the limit of 0.5.
    error, df = standard_error(np.array([4.0, 4.0]), 3)
    moderated = 4.0 * (0.5 * math.exp(0.5772156649) + 2) / 2.5
    np.testing.assert_allclose(error**2, moderated / 3, rtol=1e-9)
    np.testing.assert_array_equal(df, 2.5)


def test_borrowed_degrees_of_freedom_grow_with_the_arms_up_to_six():
    def borrowed(n_arms):
        return standard_error(np.ones(n_arms), 3)[1][0] - 2

    assert [borrowed(n) for n in (1, 2, 3, 10, 13, 40)] == [0, 0.5, 1, 4.5, 6, 6]


def test_no_arm_is_judged_by_less_than_its_own_variance():
    variance = np.array([1.0, 1.2, 0.8, 1.1, 0.01, 90.0])
    error, _ = standard_error(variance, 3)
    assert (error**2 >= variance / 3).all()
    assert error[5] ** 2 == pytest.approx(30.0)
    assert error[4] ** 2 > 10 * 0.01 / 3  # small by luck: the others make it larger


def test_arms_that_clearly_differ_in_noise_borrow_less():
    unlike = np.geomspace(1e-4, 1e4, 20)
    assert standard_error(unlike, 9)[1][0] - 8 < 1 < standard_error(np.ones(20), 9)[1][0] - 8


def test_the_prior_is_found_again_from_many_variances_drawn_from_it():
    rng = np.random.default_rng(0)
    d0, s0, df = 5.0, 0.3, 4
    true = d0 * s0 / rng.chisquare(d0, 200_000)
    scale, found_d0 = estimate_prior(true * rng.chisquare(df, 200_000) / df, df)
    assert found_d0 == pytest.approx(d0, rel=0.03)
    # exp(E log true): our scale is the geometric mean, larger than s0.
    assert scale == pytest.approx(s0 * math.exp(math.log(d0 / 2) - digamma(d0 / 2)), rel=0.02)


def test_seeds_may_differ_in_number_between_arms():
    pairs = study() | {"e": ([1.7, 1.71, 1.69, 1.7, 1.72], [2.0, 2.01, 1.98, 1.99, 2.0])}
    verdicts = judge(pairs, margin=0.01)
    assert [v.n for v in verdicts.values()] == [3, 3, 3, 3, 5]
    assert verdicts["e"].verdict == "better"


def test_holm_by_hand():
    p = np.array([0.04, 0.011, 0.5, 0.02])  # times 2, 4, 1, 3 in the order of size
    adjusted, level = holm(p, 0.07)
    np.testing.assert_allclose(adjusted, [0.08, 0.044, 0.5, 0.06])
    # Bonferroni's level, but for the arm that only its own step rejects.
    np.testing.assert_allclose(level, [0.07 / 4, 0.07 / 4, 0.07 / 4, 0.07 / 3])


def test_holm_stops_at_the_first_arm_it_cannot_reject():
    adjusted, _ = holm(np.array([0.03, 0.031, 0.032]), 0.05)
    np.testing.assert_allclose(adjusted, [0.09, 0.09, 0.09])  # though 0.032 * 1 is below 0.05


# Same, unsure, and what seeds cannot show.


def test_the_interval_decides_the_verdict_and_agrees_with_the_p_value():
    rng = np.random.default_rng(3)
    words = set()
    for seed in range(12):
        pairs = study(seed, effects=rng.choice([0.0, 0.03, -0.03, 0.2], 6), noise=0.008)
        for verdict in judge(pairs, margin=0.025).values():
            low, high = verdict.interval
            assert low < verdict.delta_bpb < high
            assert (low > 0 or high < 0) == (verdict.p_value <= 0.05)
            word = "worse" if low > 0 else "better" if high < 0 else "unsure"
            if word == "unsure" and low >= -0.025 and high <= 0.025:
                word = "same"
            assert verdict.verdict == word
            words.add(word)
    assert words == {"better", "same", "worse", "unsure"}


def test_same_needs_the_whole_interval_within_the_margin():
    pairs = {"gqa": ([2.000, 2.003, 1.999], [2.001, 2.001, 2.000])}
    low, high = judge(pairs, margin=1.0)["gqa"].interval
    reach = max(-low, high)
    assert judge(pairs, margin=reach * 1.001)["gqa"].verdict == "same"
    assert judge(pairs, margin=reach * 0.999)["gqa"].verdict == "unsure"


def test_a_real_difference_below_the_margin_is_named_and_called_small():
    verdict = judge({"b": ([1.995, 1.9951, 1.9949], [2.0, 2.0, 2.0])}, margin=0.01)["b"]
    assert verdict.verdict == "better"
    assert verdict.sentence.endswith("; less than the margin of 0.01")


@pytest.mark.parametrize(("n", "seeds"), [(0, "no seed"), (1, "1 seed,"), (2, "2 seeds,")])
def test_fewer_than_three_seeds_are_always_unsure_and_the_sentence_says_so(n, seeds):
    verdict = judge({"a": ([1.0] * n, [2.0] * n)}, margin=0.01)["a"]
    assert verdict.verdict == "unsure"
    assert verdict.delta_bpb == (-1.0 if n else None)
    assert (verdict.interval, verdict.p_value, verdict.n) == (None, None, n)
    assert seeds in verdict.sentence


def test_arms_with_too_few_seeds_leave_the_others_as_they_are():
    pairs = study()
    more = {"short": ([1.0, 1.1], [2.0, 2.1]), **pairs}
    verdicts = judge(more, margin=0.01)
    assert list(verdicts) == list(more)
    assert {name: verdicts[name] for name in pairs} == judge(pairs, margin=0.01)


def test_identical_runs_are_the_same():
    verdict = judge({"a": ([2.1, 2.2, 2.0], [2.1, 2.2, 2.0])}, margin=1e-9)["a"]
    assert (verdict.verdict, verdict.delta_bpb, verdict.interval) == ("same", 0.0, (0.0, 0.0))
    assert verdict.sentence == "same: exactly as its parent in all 3 seeds"


@pytest.mark.parametrize("parent", [[2.0, 2.0, 2.0], [2.1, 2.37, 1.93]], ids=["fixed", "varying"])
def test_a_difference_without_any_spread_shows_no_noise_and_so_proves_nothing(parent):
    verdict = judge({"a": ([loss - 0.1 for loss in parent], parent)}, margin=0.01)["a"]
    assert verdict.verdict == "unsure"
    assert verdict.delta_bpb == pytest.approx(-0.1)
    assert verdict.interval is None
    assert "was the seed used?" in verdict.sentence


def test_an_arm_that_hardly_differs_from_its_parent_does_not_blind_the_study():
    pairs = study(effects=[-0.3] + [0.0] * 9)
    root = pairs["a"][1]
    nearly = [loss + noise for loss, noise in zip(root, (1e-7, -2e-7, 0.0), strict=True)]
    before, after = (
        judge(arms, margin=0.01)["a"].interval for arms in (pairs, pairs | {"twin": (nearly, root)})
    )
    assert after[1] - after[0] < 1.5 * (before[1] - before[0])


def test_no_arms_give_no_verdicts():
    assert judge({}, margin=0.01) == {}
    assert typical_spread({}) is None


# What must not matter.


def test_arm_and_parent_swapped_flip_the_verdict():
    flip = {"better": "worse", "worse": "better", "same": "same", "unsure": "unsure"}
    pairs = study(5)
    there = judge(pairs, margin=0.02)
    back = judge({name: (parent, arm) for name, (arm, parent) in pairs.items()}, margin=0.02)
    for name in pairs:
        assert back[name].verdict == flip[there[name].verdict]
        assert back[name].delta_bpb == pytest.approx(-there[name].delta_bpb)
        assert back[name].interval == pytest.approx([-end for end in there[name].interval[::-1]])
    assert {v.verdict for v in there.values()} >= {"better", "worse"}


def test_the_unit_of_the_losses_does_not_matter():
    pairs = study(6)
    large = {name: tuple([1e3 * x for x in side] for side in pair) for name, pair in pairs.items()}
    for one, other in zip(
        judge(pairs, margin=0.05).values(), judge(large, margin=50.0).values(), strict=True
    ):
        assert one.verdict == other.verdict
        assert other.delta_bpb == pytest.approx(1e3 * one.delta_bpb)
        assert other.interval == pytest.approx([1e3 * end for end in one.interval])
        assert other.p_value == pytest.approx(one.p_value)


def test_what_a_seed_does_to_arm_and_parent_alike_does_not_matter():
    pairs = study(7)
    moved = {
        name: tuple([x + y for x, y in zip(side, (0.5, -0.2, 0.1), strict=True)] for side in pair)
        for name, pair in pairs.items()
    }
    for name, verdict in judge(moved, margin=0.01).items():
        assert verdict.interval == pytest.approx(judge(pairs, margin=0.01)[name].interval)


def test_the_order_of_arms_and_of_seeds_does_not_matter():
    pairs = study(8)
    other = {name: tuple(side[::-1] for side in pairs[name]) for name in reversed(pairs)}
    one, two = judge(pairs, margin=0.01), judge(other, margin=0.01)
    assert list(two) == list(other)
    for name in pairs:
        assert two[name].verdict == one[name].verdict
        assert two[name].interval == pytest.approx(one[name].interval)


def test_the_typical_spread_is_that_of_a_paired_difference():
    pairs = study(9, effects=[0.0, 0.5] * 10, n_seeds=40, noise=0.01)
    assert typical_spread(pairs) == pytest.approx(0.01 * math.sqrt(2), rel=0.15)


# Sentences.


def test_a_better_arm_reads_as_one_plain_sentence():
    pairs = {"mla": ([1.980, 2.077, 1.880], [2.000, 2.100, 1.900])}
    assert judge(pairs, margin=0.01, parents={"mla": "gqa"})["mla"].sentence == (
        "better: 0.0210 bits per byte lower than gqa (95 % interval 0.0167 to 0.0253, 3 seeds)"
    )


def test_a_worse_arm_names_units_and_correction():
    pairs = study(effects=(-0.5, 0.5), noise=0.01)
    verdicts = judge(pairs, margin=0.01, alpha=0.01, units="nats", parents={"b": "mha"})
    assert verdicts["a"].sentence.startswith("better: 0.")
    assert " nats lower than its parent (99 % interval 0." in verdicts["a"].sentence
    assert " nats higher than mha (99 % interval 0." in verdicts["b"].sentence
    assert verdicts["b"].sentence.endswith(", corrected for 2 arms, 3 seeds)")


def test_an_unsure_and_a_same_arm_say_what_they_rest_on():
    pairs = {"nsa": ([2.004, 2.106, 1.902], [2.0, 2.1, 1.9])}
    sentence = "the difference of +0.0040 bits per byte from mha is within the noise of 3 seeds"
    interval = "(95 % interval -0.0010 to +0.0090, 3 seeds)"
    parents = {"nsa": "mha"}
    unsure = judge(pairs, margin=0.005, parents=parents)["nsa"].sentence
    same = judge(pairs, margin=0.01, parents=parents)["nsa"].sentence
    assert unsure == f"unsure: {sentence} {interval}"
    assert same == f"same: within +-0.01 bits per byte of mha {interval}"


# Mistakes.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_loss_that_is_not_finite_is_refused_by_the_arms_name(bad, side):
    losses = [[2.0, 2.1, 2.2], [2.0, 2.0, 2.0]]
    losses[side][1] = bad
    with pytest.raises(ValueError, match=r"arm 'mla' or its parent .* not finite"):
        judge({"mla": (losses[0], losses[1])}, margin=0.01)


def test_unpaired_losses_and_senseless_bounds_are_refused():
    with pytest.raises(ValueError, match="arm 'mla' has 2 losses and its parent 3"):
        judge({"mla": ([2.0, 2.1], [2.0, 2.1, 2.2])}, margin=0.01)
    for margin in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be above 0 bits per byte"):
            judge({}, margin=margin)
    for alpha in (0.0, 1.0, 5.0):
        with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
            judge({}, margin=0.01, alpha=alpha)


# The bootstrap over documents.


def documents(n_docs, gap, seed=0):
    """Documents of 1000 bytes, the arm ``gap`` +- 0.1 bits per byte above its parent."""
    rng = np.random.default_rng(seed)
    parent = 2000 + 300 * rng.standard_normal(n_docs)
    return DocumentLosses(
        parent + 1000 * gap + 100 * rng.standard_normal(n_docs), parent, np.full(n_docs, 1000)
    )


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_documents():
    domains = {"prose": documents(400, 0.05, 1), "code": documents(100, -0.15, 2)}
    gaps = [np.subtract(d.arm_bits, d.parent_bits) / 1000 for d in domains.values()]
    center = np.mean([gap.mean() for gap in gaps])  # domains weigh the same, whatever their size
    error = math.sqrt(sum(gap.var() / len(gap) for gap in gaps)) / 2
    low, high = bootstrap_interval(domains, n_resamples=5000)
    assert low == pytest.approx(center - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(center + 1.96 * error, abs=0.15 * error)
    inner = bootstrap_interval(domains, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_a_domains_bits_per_byte_weigh_documents_by_their_bytes():
    # The difference is 1 bit per byte in one document and 0 in the other: a resample holds the
    # long one 0, 1 or 2 times, and with it 0, 9000 / 10000 or all of the bytes.
    losses = DocumentLosses([9000.0, 500.0], [0.0, 500.0], [9000, 1000])
    low, high = bootstrap_interval({"prose": losses}, level=0.4)
    assert (low, high) == (pytest.approx(0.9), pytest.approx(0.9))
    assert bootstrap_interval({"prose": losses}, level=0.99) == (0.0, 1.0)


def test_the_noise_of_documents_that_arm_and_parent_share_cancels():
    shared = documents(30, 0.0)
    shifted = DocumentLosses(np.add(shared.parent_bits, 20), shared.parent_bits, shared.n_bytes)
    assert bootstrap_interval({"prose": shifted}) == pytest.approx((0.02, 0.02))


def test_the_bootstrap_repeats_with_its_seed():
    domains = {"prose": documents(20, 0.1)}
    assert bootstrap_interval(domains) == bootstrap_interval(domains)
    assert bootstrap_interval(domains) != bootstrap_interval(domains, seed=1)


def test_many_documents_are_drawn_in_blocks_with_the_same_meaning():
    n_docs = 30_000  # 69 resamples a block
    low, high = bootstrap_interval({"prose": documents(n_docs, 0.05)}, n_resamples=150)
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(n_docs), rel=0.25)


def test_one_document_says_nothing_of_others():
    assert bootstrap_interval({"prose": documents(20, 0.1), "code": documents(1, 0.1)}) is None
    assert bootstrap_interval({}) is None


def test_documents_that_do_not_match_are_refused_by_the_domains_name():
    with pytest.raises(ValueError, match="domain 'code' has 2 documents of the arm, 1 of"):
        bootstrap_interval({"code": DocumentLosses([1.0, 2.0], [1.0], [5, 6])})
    for losses in (([math.nan, 1.0], [1.0, 1.0], [5, 5]), ([1.0, 1.0], [1.0, 1.0], [5, 0])):
        with pytest.raises(ValueError, match="domain 'code' has a loss that is not finite or"):
            bootstrap_interval({"code": DocumentLosses(*losses)})


# The distributions.


@pytest.mark.parametrize(
    ("df", "two_sided", "t"),
    [
        (1, 0.05, 12.7062047),
        (2, 0.05, 4.30265273),
        (3, 0.05, 3.18244631),
        (10, 0.05, 2.22813885),
        (120, 0.05, 1.97993041),
        (2, 0.01, 9.92484320),
        (10, 0.01, 3.16927267),
        (5, 0.001, 6.86882663),
    ],
)
def test_students_t_agrees_with_the_tables(df, two_sided, t):
    assert student_t_quantile(two_sided, df) == pytest.approx(t, rel=1e-8)
    assert student_t_two_sided(t, df) == pytest.approx(two_sided, rel=1e-7)


def test_students_t_agrees_with_its_closed_forms_from_center_to_far_tail():
    t = np.array([0.0, 1e-9, 0.01, 0.5, 1.0, 2.0, 7.0, 60.0, 1e4])
    one = 1 - 2 / np.pi * np.arctan(t)
    np.testing.assert_allclose(student_t_two_sided(t, 1)[:-1], one[:-1], rtol=1e-12)
    two = 2 / (t * t + 2 + t * np.sqrt(t * t + 2))  # 1 - t / sqrt(t^2 + 2), without cancelling
    np.testing.assert_allclose(student_t_two_sided(t, 2), two, rtol=1e-13)
    np.testing.assert_array_equal(student_t_two_sided(-t, 2), student_t_two_sided(t, 2))


@pytest.mark.parametrize("df", [2.5, 6.5, 40.25])
def test_students_t_with_broken_degrees_of_freedom_is_the_area_under_its_density(df):
    step = 3.3 / 20_000
    x = (np.arange(20_000) + 0.5) * step  # the midpoint rule
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi * df) / 2
    area = step * np.sum(np.exp(log_scale) * (1 + x * x / df) ** (-(df + 1) / 2))
    assert student_t_two_sided(3.3, df) == pytest.approx(1 - 2 * area, abs=1e-9)


def test_the_quantile_undoes_the_tail_for_any_level():
    levels = np.geomspace(1e-12, 0.99, 30)
    for df in (1, 2.5, 8, 200):
        np.testing.assert_allclose(
            student_t_two_sided(student_t_quantile(levels, df), df), levels, rtol=1e-11
        )


def test_digamma_and_trigamma_have_their_known_values_and_steps():
    gamma = 0.57721566490153286
    np.testing.assert_allclose(digamma([1, 0.5]), [-gamma, -gamma - 2 * math.log(2)], rtol=1e-13)
    np.testing.assert_allclose(trigamma([1, 0.5]), [math.pi**2 / 6, math.pi**2 / 2], rtol=1e-13)
    x = np.array([0.03, 0.7, 3.0, 25.0, 1e4])
    np.testing.assert_allclose(digamma(x + 1) - digamma(x), 1 / x, rtol=1e-9)
    slope = (digamma(x * 1.0001) - digamma(x * 0.9999)) / (0.0002 * x)
    np.testing.assert_allclose(trigamma(x), slope, rtol=1e-6)


def test_trigamma_is_inverted_over_its_range():
    x = np.geomspace(1e-5, 1e6, 23)
    np.testing.assert_allclose(trigamma_inverse(trigamma(x)), x, rtol=1e-9)
