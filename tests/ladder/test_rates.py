"""The rate of a sweep is the minimum of a parabola in log lr, or the best point with a reason."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.ladder.rates import best_rate

GRID = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]


def parabola(best: float, curve: float = 0.1) -> list[tuple[float, float]]:
    return [(lr, 3 + curve * math.log(lr / best) ** 2) for lr in GRID]


@given(st.floats(0.0029, 0.011), st.permutations(range(len(GRID))))
def test_the_minimum_of_a_parabola_is_found_between_the_points_in_any_order(best, order):
    points = parabola(best)
    found = best_rate([points[i] for i in order])
    assert found.is_minimum
    assert found.lr == pytest.approx(best, rel=0.006)  # three digits
    assert found.points == tuple(points)


@pytest.mark.parametrize(("best", "edge"), [(0.0001, 0.001), (1.0, 0.032)])
def test_a_minimum_at_the_edge_is_the_edge_and_says_so(best, edge):
    found = best_rate(parabola(best))
    assert (found.lr, found.is_minimum) == (edge, False)
    assert "edge" in found.note


def test_far_points_that_explode_do_not_move_the_minimum():
    points = [*parabola(0.004)[:5], (0.032, 90.0)]
    assert best_rate(points).lr == pytest.approx(0.004, rel=0.006)


def test_a_single_point_is_an_edge():
    assert best_rate([(0.01, 3.0)]).lr == 0.01


def test_where_no_parabola_fits_the_best_point_is_taken():
    points = [(0.001, 1.0), (0.002, 9.0), (0.004, 2.9), (0.008, 9.0), (0.016, 1.1), (0.032, 0.9)]
    assert best_rate([(lr, bpb) for lr, bpb in points if lr < 0.032][1:]).lr == 0.016
    hollow = [(0.001, 3.0), (0.002, 2.99), (0.004, 3.5), (0.008, 3.0), (0.016, 2.995)]
    found = best_rate(hollow)
    assert (found.lr, found.is_minimum) == (0.002, False)


def test_no_point_is_refused():
    with pytest.raises(ValueError, match="no run of the learning-rate sweep finished"):
        best_rate([])
