"""Sampling: each filter by a hand case, the order they come in, and the distribution drawn."""

import math

import pytest
import torch

from fathom.generate.sample import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    probabilities,
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
    [(0.3, [0]), (0.51, [0, 1]), (0.69, [0, 1]), (0.71, [0, 1, 2]), (1.0, [0, 1, 2, 3, 4])],
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
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**wrong)
