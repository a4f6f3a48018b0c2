"""The learning rate of an arm from a sweep: the lowest point of a parabola in ``log lr``.

Equal rates are not equal treatment: an arm is judged at its own best rate. Near its minimum the
loss is quadratic in the logarithm of the rate, so a few points give a minimum between them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 2  # points on each side of the best one that the parabola goes through


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep found for one arm.

    Args:
        lr: the rate to use.
        points: ``(lr, bits per byte)`` of the runs that finished, by rate.
        is_minimum: ``lr`` is the minimum of a parabola through the points around the best one.
        note: how ``lr`` came about.
    """

    lr: float
    points: tuple[tuple[float, float], ...]
    is_minimum: bool
    note: str


def best_rate(points: Sequence[tuple[float, float]]) -> Swept:
    """Choose a rate from ``(lr, bits per byte)``; runs that diverged are left out by the caller.

    Raises:
        ValueError: no point at all.
    """
    known = tuple(sorted(points))
    if not known:
        raise ValueError("no run of the learning-rate sweep finished")
    best = min(range(len(known)), key=lambda i: known[i][1])
    lowest = known[best][0]
    if best in (0, len(known) - 1):
        note = f"the best point, {lowest:.3g}, lies at the edge: a wider sweep may find better"
        return Swept(lr=lowest, points=known, is_minimum=False, note=note)
    near = known[max(best - NEIGHBOURS, 0) : best + NEIGHBOURS + 1]
    x = np.log([lr for lr, _ in near])
    a, b, _ = np.polyfit(x - x.mean(), [bpb for _, bpb in near], 2)
    inside = (math.log(known[best - 1][0]), math.log(known[best + 1][0]))
    if a <= 0 or not inside[0] <= (at := x.mean() - b / (2 * a)) <= inside[1]:
        note = f"the best point, {lowest:.3g}: no parabola fits those around it"
        return Swept(lr=lowest, points=known, is_minimum=False, note=note)
    lr = _rounded(math.exp(at))
    note = "the minimum of a parabola in log lr"
    return Swept(lr=lr, points=known, is_minimum=True, note=note)


def _rounded(lr: float) -> float:
    """Three digits: more would claim more than a sweep knows."""
    return float(f"{lr:.3g}")
