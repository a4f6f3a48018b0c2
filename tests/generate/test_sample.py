"""Sampling: each filter by a hand case, the order they come in, and the distribution drawn."""

import math

import pytest
import torch

from fathom.generate.sample import (
    Said,
    Sampling,
    adjusted,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    probabilities,
    token_logprobs,
)

P = [0.5, 0.2, 0.15, 0.1, 0.05]
LOGITS = torch.tensor([P]).log()


def kept(logits_BV: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits_BV]


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def draw(logits_V: torch.Tensor, sampling: Sampling, n: int) -> torch.Tensor:
    """Shares of ``n`` draws, one generator going on."""
    generator = torch.Generator().manual_seed(7)
    ids = next_tokens(logits_V.expand(n, -1), sampling, [generator] * n)
    return torch.bincount(ids, minlength=logits_V.shape[-1]) / n


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [[0, 1]]
    assert kept(keep_top_k(LOGITS.flip(-1), 1)) == [[4]]
    assert kept(keep_top_k(LOGITS, 99)) == [[0, 1, 2, 3, 4]]


def test_top_k_keeps_all_that_tie_with_the_kth() -> None:
    assert kept(keep_top_k(torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]), 2)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("p", "tokens"),
    [
        (0.0, [0]),
        (0.3, [0]),
        (0.51, [0, 1]),
        (0.69, [0, 1]),
        (0.71, [0, 1, 2]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, tokens: list[int]) -> None:
    assert kept(keep_top_p(LOGITS, p)) == [tokens]


def test_top_p_works_row_by_row_in_any_order() -> None:
    rows = torch.stack([LOGITS[0], LOGITS[0].flip(-1), torch.zeros(5)])
    assert kept(keep_top_p(rows, 0.6)) == [[0, 1], [3, 4], [0, 1, 2]]


def test_top_p_keeps_one_token_however_small_p_is() -> None:
    assert kept(keep_top_p(LOGITS, 1e-9)) == [[0]]


@pytest.mark.parametrize(
    ("min_p", "tokens"),
    [(0.0, [0, 1, 2, 3, 4]), (0.25, [0, 1, 2]), (0.35, [0, 1]), (1.0, [0])],
)
def test_min_p_is_a_share_of_the_likeliest(min_p: float, tokens: list[int]) -> None:
    assert kept(keep_min_p(LOGITS, min_p)) == [tokens]


def test_temperature_divides_the_logits() -> None:
    got = probabilities(LOGITS, Sampling(temperature=2.0))
    want = torch.tensor(P).sqrt()
    torch.testing.assert_close(got[0], want / want.sum())
    cold = probabilities(LOGITS, Sampling(temperature=0.01))
    torch.testing.assert_close(cold[0], torch.tensor([1.0, 0, 0, 0, 0]))


def test_each_filter_works_on_what_the_one_before_left() -> None:
    # The three likeliest are 0.59, 0.24 and 0.18 of what top-k leaves, so the first two reach 0.8;
    # of the whole they would be 0.5 and 0.2, and a third would be needed.
    got = probabilities(LOGITS, Sampling(temperature=1.0, top_k=3, top_p=0.8))
    torch.testing.assert_close(got[0], torch.tensor([5 / 7, 2 / 7, 0, 0, 0]))


def test_half_precision_logits_are_widened_first() -> None:
    logits = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    got = probabilities(logits, Sampling(temperature=1.0, top_p=0.5))
    assert got.dtype == torch.float32
    assert (got > 0).sum() == 2048


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    rows = generators(2)
    before = [g.get_state() for g in rows]
    ids = next_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]]), Sampling(), rows)
    assert ids.tolist() == [1, 0]
    assert all(torch.equal(g.get_state(), b) for g, b in zip(rows, before, strict=True))


def test_draws_follow_the_probabilities() -> None:
    n = 20_000
    shares = draw(LOGITS[0], Sampling(temperature=1.0), n)
    for share, p in zip(shares.tolist(), P, strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_token_that_was_filtered_out_is_never_drawn() -> None:
    shares = draw(LOGITS[0], Sampling(temperature=5.0, top_k=2), 2_000)
    assert (shares[:2] > 0.3).all()
    assert shares[2:].sum() == 0


def test_a_row_draws_alike_whatever_stands_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    how = Sampling(temperature=1.0)
    together = next_tokens(logits, how, generators(3))
    alone = [next_tokens(logits[i : i + 1], how, [generators(3)[i]]).item() for i in range(3)]
    assert together.tolist() == alone


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not numbers"):
        next_tokens(torch.tensor([[0.0, math.nan]]), Sampling(), generators(1))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite"),
        ({"temperature": math.nan}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": -0.1}, "top_p must be from 0 to 1, got -0.1"),
        ({"top_p": 1.1}, "top_p must be from 0 to 1"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be above 0 and finite"),
        ({"presence_penalty": math.nan}, "presence_penalty must be from -100 to 100, got nan"),
        ({"frequency_penalty": 101.0}, "frequency_penalty must be from -100 to 100"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias must name ids from 0 on, got -1"),
        ({"logit_bias": {1: 200.0}}, "logit_bias must be from -100 to 100, got 200"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**wrong)


# --- Against the exact distribution ------------------------------------------------------------

RAW = [1.2, -0.4, 0.9, -1.5, 0.1, 0.7]
PROMPT, GENERATED = [0, 3, 3], [2, 2, 3, 5]
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 3},
    "top-k-above-the-vocabulary": {"top_k": 1000},
    "top-p": {"top_p": 0.7},
    "top-p-0": {"top_p": 0.0},
    "top-p-1": {"top_p": 1.0},
    "min-p": {"min_p": 0.3},
    "repetition": {"repetition_penalty": 1.8},
    "repetition-below-1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.6},
    "negative-penalties": {"presence_penalty": -0.5, "frequency_penalty": -0.3},
    "bias": {"logit_bias": {1: 2.0, 4: -100.0}},
    "all": {
        "temperature": 1.3,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {3: 1.5},
    },
}


def said() -> Said:
    record = Said([PROMPT], len(RAW), torch.device("cpu"))
    for token_id in GENERATED:
        record.add(torch.tensor([token_id]))
    return record


def exact(how: Sampling) -> list[float]:
    """The same definition a second time, number by number in float64."""
    logits = []
    for token_id, x in enumerate(RAW):
        if token_id in PROMPT + GENERATED:
            x = x / how.repetition_penalty if x > 0 else x * how.repetition_penalty
        times = GENERATED.count(token_id)
        x -= how.presence_penalty * (times > 0) + how.frequency_penalty * times
        logits.append((x + how.logit_bias.get(token_id, 0.0)) / how.temperature)
    left = dict(enumerate(logits))
    if how.top_k is not None:
        left = dict(sorted(left.items(), key=lambda item: -item[1])[: how.top_k])
    if how.top_p is not None:
        together, kept = 0.0, {}
        for token_id, p in sorted(normal(left).items(), key=lambda item: -item[1]):
            if not kept or together < how.top_p:
                kept[token_id] = left[token_id]
            together += p
        left = kept
    if how.min_p is not None:
        p = normal(left)
        left = {i: x for i, x in left.items() if p[i] >= how.min_p * max(p.values())}
    found = normal(left)
    return [found.get(i, 0.0) for i in range(len(RAW))]


def normal(logits: dict[int, float]) -> dict[int, float]:
    total = sum(math.exp(x) for x in logits.values())
    return {i: math.exp(x) / total for i, x in logits.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_fit_the_exact_distribution(name: str) -> None:
    how, n = Sampling(**{"temperature": 1.0, **SETTINGS[name]}), 6_000
    want = exact(how)
    logits_1V = adjusted(torch.tensor([RAW]), how, said())
    torch.testing.assert_close(probabilities(logits_1V, how)[0], torch.tensor(want))
    drawn = (draw(logits_1V[0], how, n) * n).tolist()
    assert all(count == 0 for count, p in zip(drawn, want, strict=True) if p < 1e-12)
    terms = [(c - n * p) ** 2 / (n * p) for c, p in zip(drawn, want, strict=True) if p >= 1e-12]
    freedom = len(terms) - 1
    z = 3.3  # one in two thousand, by Wilson and Hilferty's cube root
    limit = (
        freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 0
    )
    assert sum(terms) <= limit + 1e-9


def test_greedy_follows_penalties_and_bias_too() -> None:
    assert RAW.index(max(RAW)) == 0
    how = Sampling(repetition_penalty=20.0)
    assert next_tokens(adjusted(torch.tensor([RAW]), how, said()), how, []).tolist() == [4]
    how = Sampling(logit_bias={3: 50.0})
    assert next_tokens(adjusted(torch.tensor([RAW]), how), how, []).tolist() == [3]


def test_nothing_asked_leaves_the_logits_alone() -> None:
    assert torch.equal(adjusted(torch.tensor([RAW]), Sampling()), torch.tensor([RAW]))


def test_rows_are_penalised_for_their_own_words_alone() -> None:
    record = Said([[0], [1]], 3, torch.device("cpu"))
    record.add(torch.tensor([2, 2]))
    record.add(torch.tensor([2, 0]))
    how = Sampling(repetition_penalty=2.0, frequency_penalty=1.0)
    got = adjusted(torch.ones(2, 3), how, record)
    assert got.tolist() == [[0.5, 1.0, -1.5], [-0.5, 0.5, -0.5]]


def test_a_bias_on_an_id_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="ids from 0 to 5, got 6"):
        adjusted(torch.tensor([RAW]), Sampling(logit_bias={6: 1.0}))


def test_log_probabilities_are_those_of_the_logits() -> None:
    rows = torch.tensor([RAW, RAW[::-1]])
    first, second = token_logprobs(rows, torch.tensor([1, 1]), 2)
    p = normal(dict(enumerate(RAW)))
    assert first.token_id == second.token_id == 1
    assert first.logprob == pytest.approx(math.log(p[1]))
    assert second.logprob == pytest.approx(math.log(p[4]))
    assert [i for i, _ in first.top] == [0, 2]
    assert [x for _, x in first.top] == pytest.approx([math.log(p[0]), math.log(p[2])])
    assert [i for i, _ in second.top] == [5, 3]
    (none, _), (all_of_them, _) = (token_logprobs(rows, torch.tensor([1, 1]), n) for n in (0, 99))
    assert none.top == []
    assert math.fsum(math.exp(x) for _, x in all_of_them.top) == pytest.approx(1.0)
