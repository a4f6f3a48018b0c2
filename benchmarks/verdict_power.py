"""How often ``fathom.ladder.verdict`` shows a difference that is not there, and which it finds.

    python benchmarks/verdict_power.py [--studies 20000] [--out benchmarks/results/...]

No training: whole studies of random losses, judged by the shipped test and by three others.
``paired-t``: a paired t per arm; ``smyth``: the moderated t of Smyth (2004) without our limits;
both with Holm's correction. ``twice-the-spread``: a mean difference beyond two standard deviations
of the paired differences.
"""

import argparse
import itertools
import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np

from fathom.ladder.verdict import (
    Floats,
    detectable_delta,
    digamma,
    estimate_prior,
    holm,
    standard_error,
    student_t_quantile,
    student_t_two_sided,
)

ALPHA = 0.05
Errors = Callable[[Floats, int], tuple[Floats, Floats]]  # variances, seeds -> errors, df
Row = dict[str, object]


def paired_t(variance_SA: Floats, n_seeds: int) -> tuple[Floats, Floats]:
    return np.sqrt(variance_SA / n_seeds), np.full_like(variance_SA, n_seeds - 1)


def smyth(variance_SA: Floats, n_seeds: int) -> tuple[Floats, Floats]:
    """Smyth 2004, section 6.2, but for the floor of our estimate; one arm has no prior."""
    if variance_SA.shape[-1] < 2:
        return paired_t(variance_SA, n_seeds)
    df = n_seeds - 1
    scale, d0 = estimate_prior(variance_SA, df)
    d0 = np.minimum(d0, 1e6)  # stands for infinity
    scale = scale * np.exp(digamma(d0 / 2) - np.log(d0 / 2))
    d0, scale = d0[..., None], scale[..., None]
    moderated = (d0 * scale + df * variance_SA) / (d0 + df)
    total = np.minimum(d0 + df, df * variance_SA.shape[-1])
    return np.sqrt(moderated / n_seeds), np.broadcast_to(total, moderated.shape)


def runs(rng: np.random.Generator, shape: tuple[int, int, int], noise: str) -> Floats:
    """Losses without any true difference. [studies, root and arms, seeds]"""
    losses = rng.standard_t(4, shape) if "heavy" in noise else rng.standard_normal(shape)
    factor = 10 if "tenfold" in noise else 4
    if "unequal" in noise:  # each run's standard deviation is log-uniform over this factor
        losses *= factor ** rng.uniform(0, 1, (*shape[:2], 1))
    if "one-arm" in noise:
        losses[:, 1] *= factor
    return losses


def differences(losses: Floats, parents: str) -> Floats:
    """Arm - parent. [studies, arms, seeds]"""
    return losses[:, 1:] - (losses[:, :1] if parents == "root" else losses[:, :-1])


def p_values(delta_SAN: Floats, errors: Errors) -> Floats:
    error, df = errors(delta_SAN.var(axis=-1, ddof=1), delta_SAN.shape[-1])
    return student_t_two_sided(delta_SAN.mean(axis=-1) / error, df)


def false_studies(delta_SAN: Floats, errors: Errors) -> float:
    adjusted, _ = holm(p_values(delta_SAN, errors), ALPHA)
    return float((adjusted.min(axis=-1) <= ALPHA).mean())


def beyond_twice_the_spread(delta_SAN: Floats) -> float:
    found = np.abs(delta_SAN.mean(axis=-1)) > 2 * delta_SAN.std(axis=-1, ddof=1)
    return float(found.any(axis=-1).mean())


def sample(studies: int, n_arms: int) -> int:
    """More studies where they are small: up to five times as many."""
    return studies * max(1, min(5, 20 // n_arms))


def row(case: str, metric: str, unit: str, ours: float, **more: object) -> Row:
    empty: Row = {"peers": {}, "ratio_to_best_peer": None, "spread": None}
    return {"case": case, "metric": metric, "unit": unit, "ours": round(ours, 4)} | empty | more


def share_error(share: float, studies: int) -> float:
    return round(math.sqrt(share * (1 - share) / studies), 4)


def nothing_differs(rng: np.random.Generator, studies: int) -> Iterator[Row]:
    """The promise: at most 5 % of studies without a true difference show one.

    Where runs are equally noisy, or unequally by up to a factor of 4, with normal or heavy tails.
    The two tenfold cases ask for more than is promised.
    """
    noises = ("equal", "unequal", "heavy", "unequal-heavy", "unequal-tenfold", "one-arm-tenfold")
    cases = itertools.product((3, 5), (1, 2, 3, 5, 10, 20), noises, ("root", "chain"))
    for n_seeds, n_arms, noise, parents in cases:
        n_studies = sample(studies, n_arms)
        delta = differences(runs(rng, (n_studies, n_arms + 1, n_seeds), noise), parents)
        ours = false_studies(delta, standard_error)
        peers = {
            "paired-t": round(false_studies(delta, paired_t), 4),
            "smyth": round(false_studies(delta, smyth), 4),
            "twice-the-spread": round(beyond_twice_the_spread(delta), 4),
        }
        case = f"{n_arms} arms, {n_seeds} seeds, {noise}, {parents}"
        spread = share_error(ours, n_studies)
        yield row(case, "false_studies", "share", ours, peers=peers, spread=spread)


def noisier_half_null(rng: np.random.Generator, studies: int) -> Iterator[Row]:
    """Beyond the promise: the quieter arms all differ, so Holm tests only the noisier half."""
    for n_seeds in (3, 5):
        for n_arms in (4, 10, 20):
            losses = rng.standard_normal((studies, n_arms + 1, n_seeds))
            sd = np.sort(4 ** rng.uniform(0, 1, (studies, n_arms)), axis=-1)[:, ::-1, None]
            losses[:, 1:] *= sd
            losses[:, :1] *= 4 ** rng.uniform(0, 1, (studies, 1, 1))
            losses[:, 1 + n_arms // 2 :] += 1000.0
            adjusted, _ = holm(p_values(differences(losses, "root"), standard_error), ALPHA)
            share = float((adjusted[:, : n_arms // 2].min(axis=-1) <= ALPHA).mean())
            case = f"{n_arms} arms, {n_seeds} seeds, unequal, root, only the noisier half is null"
            yield row(case, "false_studies", "share", share, spread=share_error(share, studies))


def intervals(rng: np.random.Generator, studies: int) -> Iterator[Row]:
    """All intervals of a study at once, with random true differences; and a false ``same``."""
    for n_seeds in (3, 5):
        for noise in ("equal", "unequal", "heavy"):
            losses = runs(rng, (studies, 11, n_seeds), noise)
            true_SA = rng.choice([0.0, 4.0, 20.0], (studies, 10))
            delta = differences(losses, "root") + true_SA[..., None]
            error, df = standard_error(delta.var(axis=-1, ddof=1), n_seeds)
            mean = delta.mean(axis=-1)
            _, level = holm(student_t_two_sided(mean / error, df), ALPHA)
            half = student_t_quantile(level, df) * error
            missed = float((np.abs(mean - true_SA) > half).any(axis=-1).mean())
            case = f"10 arms, {n_seeds} seeds, {noise}, root, true differences of 0, 4 and 20 sd"
            spread = share_error(missed, studies)
            yield row(case, "studies_with_a_missed_truth", "share", missed, spread=spread)
            # Every true difference is just as large as the margin, so that no arm is the same.
            margin = float(np.quantile(half, 0.9))
            shifted = mean - true_SA + margin
            _, level = holm(student_t_two_sided(shifted / error, df), ALPHA)
            half = student_t_quantile(level, df) * error
            low, high = shifted - half, shifted + half
            same = (low <= 0) & (high >= 0) & (low > -margin) & (high < margin)
            wrong = float(same.any(axis=-1).mean())
            case = f"10 arms, {n_seeds} seeds, {noise}, root, all differ by the margin"
            yield row(case, "false_same", "share", wrong, spread=share_error(wrong, studies))


def power(rng: np.random.Generator, studies: int) -> Iterator[Row]:
    """The true difference found in 80 of 100 studies, in two units."""
    for n_seeds in (3, 5):
        for n_arms in (1, 5, 10, 20):
            ours = detectable_delta(1.0, n_seeds=n_seeds, n_arms=n_arms)
            assert ours is not None
            delta = differences(runs(rng, (studies, n_arms + 1, n_seeds), "equal"), "root")
            bound = student_t_quantile(ALPHA / n_arms, n_seeds - 1.0)
            error, _ = paired_t(delta[:, 0].var(axis=-1, ddof=1), n_seeds)
            need = np.quantile(bound * error - delta[:, 0].mean(axis=-1), 0.8) / math.sqrt(2)
            for unit, scale in (("paired difference", 1.0), ("one arm's loss", math.sqrt(2))):
                yield row(
                    f"{n_arms} arms, {n_seeds} seeds",
                    "delta_found_with_80_percent",
                    f"standard deviation of {unit}",
                    ours * scale,
                    peers={"paired-t": round(float(need) * scale, 4)},
                    ratio_to_best_peer=round(float(need) / ours, 3),
                )


def record(studies: int) -> dict[str, object]:
    rng = np.random.default_rng(20)
    parts = (nothing_differs, noisier_half_null, intervals, power)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "benchmark": "verdict_power_cpu",
        "device": "cpu",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "commit": commit or None,
        "date": date.today().isoformat(),
        "limits": {"alpha": ALPHA},
        "note": "spread is the Monte Carlo standard error of a share",
        "rows": [found for part in parts for found in part(rng, studies)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=20000)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "verdict_power_cpu.json"
    )
    args = parser.parse_args()
    args.out.write_text(json.dumps(record(args.studies), indent=1) + "\n")
    print(f"wrote {args.out}")
