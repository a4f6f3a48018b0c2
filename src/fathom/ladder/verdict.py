"""Better, same, worse or unsure: what the seeds of a study say about each arm and its parent.

The unit is the paired difference: the arm's final loss minus its parent's, at the same seed.
With three seeds its variance has two degrees of freedom, and a paired t corrected for ten arms
then sees only differences of ten times the spread. So the arms tell each other what the noise
is: a moderated t (Smyth 2004, "Linear models and empirical Bayes methods", sections 4 to 6)
moves every variance towards the study's typical one, and Holm's step-down (1979) keeps the share
of *studies* with any false ``better`` or ``worse`` at ``alpha``.

Smyth's rule as it stands is too bold here: arms with a common parent have dependent variances,
and ten variances of two degrees of freedom hardly show that some arms are noisier than others.
Simulated (``benchmarks/verdict_power.py``), it gives up to 9 % of false studies where standard
deviations differ by a factor of 4, and 25 % where one arm is ten times as noisy. Three limits keep
them at 5 % (5.4 % in that last case), with heavy tails, shared parents and chains too:

- the prior weighs at most half a degree of freedom per *other* arm, and at most six: one arm
  alone gets the plain paired t, ten arms borrow 4.5;
- the prior's scale is the geometric mean of the variances, not Smyth's smaller estimate;
- no arm is judged by less than its own variance: the others make a variance larger that is
  small by luck, and lend degrees of freedom, but never excuse a noisy arm.

So ten arms find, four times in five, a true difference of 3.6 standard deviations of a paired
difference with three seeds and of 2.3 with five (a paired t: 10.3 and 3.2).

Shapes: A arms of a study, S simulated studies (absent in a real one), N seeds, D documents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MIN_SEEDS = 3
PRIOR_DF_PER_ARM = 0.5
MAX_PRIOR_DF = 6.0
ROUNDING = 1e-12  # a spread below this share of the losses is float64 rounding, not noise


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about one arm.

    Attributes:
        verdict: ``better`` or ``worse`` where ``interval`` excludes 0; ``same`` where it lies
            within the margin; else ``unsure``.
        delta_bpb: mean over the seeds of arm - parent; negative is better; None without a seed.
        interval: of the true difference, at level ``1 - alpha / A`` (Bonferroni), so that the
            intervals of a study hold together. Where only a later step of Holm's excludes 0,
            the interval has the level of that step.
        p_value: two-sided, adjusted by Holm; None where the seeds allow no test.
        n: seeds that arm and parent both have.
        sentence: all of it, for a reader who has read nothing else.
    """

    verdict: Literal["better", "same", "worse", "unsure"]
    delta_bpb: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    n: int
    sentence: str


def judge(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    margin: float,
    alpha: float = 0.05,
    units: str = "bits per byte",
    parents: Mapping[str, str] | None = None,
) -> dict[str, Verdict]:
    """Judge all arms of one study at once: the correction counts the arms of the call.

    Args:
        pairs: name to (the arm's losses, its parent's losses), one per seed, in equal order.
        margin: a true difference within +-margin counts as none: what ``same`` means.
        alpha: share of studies without any true difference that may show one.
        parents: name to the parent's name, for the sentences.

    Raises:
        ValueError: ``margin`` or ``alpha`` is out of range, a loss is not finite (a failed run
            is the caller's to leave out), or the two lists of a pair differ in length.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be above 0 {units}, got {margin}: it says what 'same' means")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha} (0.05 is usual)")
    words = _Words(units, margin, alpha)
    found: dict[str, Verdict] = {}
    tested: dict[str, tuple[str, Floats]] = {}
    for name, (arm, parent) in pairs.items():
        versus = (parents or {}).get(name, "its parent")
        delta_N = _differences(name, arm, parent)
        rounding = ROUNDING * max(map(abs, arm), default=0.0)
        if len(delta_N) < MIN_SEEDS:
            found[name] = words.too_few(delta_N, versus)
        elif np.ptp(delta_N) <= rounding:
            found[name] = words.without_spread(delta_N, versus, rounding)
        else:
            tested[name] = versus, delta_N
    if tested:
        found |= _judge_tested(tested, words)
    return {name: found[name] for name in pairs}


def _differences(name: str, arm: Sequence[float], parent: Sequence[float]) -> Floats:
    if len(arm) != len(parent):
        raise ValueError(
            f"arm {name!r} has {len(arm)} losses and its parent {len(parent)}: "
            "pass the seeds that both have, in the same order"
        )
    losses = np.array([arm, parent], dtype=np.float64)
    if not np.isfinite(losses).all():
        raise ValueError(
            f"arm {name!r} or its parent has a loss that is not finite ({losses.tolist()}): "
            "report it as failed and leave it out"
        )
    return losses[0] - losses[1]


def _judge_tested(tested: Mapping[str, tuple[str, Floats]], words: "_Words") -> dict[str, Verdict]:
    deltas = [delta_N for _, delta_N in tested.values()]
    mean_A = np.array([delta.mean() for delta in deltas])
    variance_A = np.array([delta.var(ddof=1) for delta in deltas])
    n_A = np.array([len(delta) for delta in deltas])
    error_A, df_A = standard_error(variance_A, n_A)
    p_A = student_t_two_sided(mean_A / error_A, df_A)
    adjusted_A, level_A = holm(p_A, words.alpha)
    half_A = student_t_quantile(level_A, df_A) * error_A
    return {
        name: words.tested(versus, len(delta), float(mean), float(half), float(p), len(tested))
        for (name, (versus, delta)), mean, half, p in zip(
            tested.items(), mean_A, half_A, adjusted_A, strict=True
        )
    }


# The test: moderated variances, Holm's step-down.


def standard_error(variance_A: Floats, n_A: ArrayLike) -> tuple[Floats, Floats]:
    """Standard errors of the mean differences, and their degrees of freedom.

    Args:
        variance_A: sample variance of each arm's paired differences, above 0. [..., A]
        n_A: seeds of each arm, 2 or more.
    """
    df_A = np.broadcast_to(np.asarray(n_A, dtype=np.float64) - 1, variance_A.shape)
    scale, prior_df = estimate_prior(variance_A, df_A)
    n_others = variance_A.shape[-1] - 1
    prior_df = np.minimum(prior_df, min(PRIOR_DF_PER_ARM * n_others, MAX_PRIOR_DF))[..., None]
    moderated_A = (prior_df * scale[..., None] + df_A * variance_A) / (prior_df + df_A)
    return np.sqrt(np.maximum(moderated_A, variance_A) / (df_A + 1)), prior_df + df_A


def estimate_prior(variance_A: Floats, df_A: ArrayLike) -> tuple[Floats, Floats]:
    """A study's typical variance, and the degrees of freedom that the arms' likeness is worth.

    Smyth 2004, section 6.2: ``e = log s^2 - digamma(df / 2) + log(df / 2)`` has the mean of the
    true log variances; what its variance exceeds ``trigamma(df / 2)`` by is ``trigamma(d0 / 2)``.
    An arm that hardly differs from its parent says little of the others' noise, so a variance
    counts here as at least a hundredth of the median.

    Returns:
        exp(mean of e), the geometric mean without its bias, and d0 (inf: all variances are
        alike, or there is one arm), both without the last dim.
    """
    half = np.asarray(df_A, dtype=np.float64) / 2
    least = 0.01 * np.median(variance_A, axis=-1, keepdims=True)
    e_A = np.log(np.maximum(variance_A, least)) - digamma(half) + np.log(half)
    mean = e_A.mean(axis=-1)
    n_others = e_A.shape[-1] - 1
    excess = ((e_A - mean[..., None]) ** 2).sum(axis=-1) / max(n_others, 1)
    excess = excess - trigamma(np.broadcast_to(half, e_A.shape)).mean(axis=-1)
    some = np.where(excess > 0, excess, 1.0)
    return np.exp(mean), np.where(excess > 0, 2 * trigamma_inverse(some), np.inf)


def holm(p_A: Floats, alpha: float) -> tuple[Floats, Floats]:
    """Holm's adjusted p-values, and the level at which each arm's interval is to be drawn.

    The k-th smallest of A p-values is multiplied by A - k + 1, and is no smaller than the one
    before. Levels are Bonferroni's, but for an arm that only its own step rejects.
    """
    n_arms = p_A.shape[-1]
    order = p_A.argsort(axis=-1)
    left = n_arms - order.argsort(axis=-1)  # hypotheses still there at this arm's step
    steps = np.take_along_axis(left * p_A, order, axis=-1)
    ordered = np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0)
    adjusted_A = np.take_along_axis(ordered, order.argsort(axis=-1), axis=-1)
    by_step = (adjusted_A <= alpha) & (n_arms * p_A > alpha)
    return adjusted_A, alpha / np.where(by_step, left, n_arms)


# What a study can see.


def typical_spread(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> float | None:
    """The study's typical standard deviation of a paired difference; None if no arm shows one."""
    deltas = [_differences(name, *losses) for name, losses in pairs.items()]
    kept = [delta for delta in deltas if len(delta) >= MIN_SEEDS and np.ptp(delta) > 0]
    if not kept:
        return None
    variance_A = np.array([delta.var(ddof=1) for delta in kept])
    scale, _ = estimate_prior(variance_A, np.array([len(delta) - 1 for delta in kept]))
    return math.sqrt(scale)


def detectable_delta(
    spread: float, *, n_seeds: int, n_arms: int, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """The true difference that a study finds with probability ``power``; None below three seeds.

    Found by the rule itself on 4000 simulated studies in which all arms share one parent, noise
    is equal and normal, and no other arm differs (the hardest case for Holm). Error about 2 %.

    Args:
        spread: standard deviation of a paired difference, as ``typical_spread`` gives it (with
            independent seeds, the square root of 2 times that of one arm's losses).
    """
    if n_seeds < MIN_SEEDS:
        return None
    runs = np.random.default_rng(0).standard_normal((4000, n_arms + 1, n_seeds))
    delta_SAN = (runs[:, 1:] - runs[:, :1]) / math.sqrt(2)
    error_SA, df_SA = standard_error(delta_SAN.var(axis=-1, ddof=1), n_seeds)
    bound_S = student_t_quantile(alpha / n_arms, df_SA[:, 0]) * error_SA[:, 0]
    return spread * float(np.quantile(bound_S - delta_SAN[:, 0].mean(axis=-1), power))


class DocumentLosses(NamedTuple):
    """One domain's held-out documents: summed bits under arm and parent, and bytes. Each [D]."""

    arm_bits: Sequence[float]
    parent_bits: Sequence[float]
    n_bytes: Sequence[int]


def bootstrap_interval(
    per_document: Mapping[str, DocumentLosses],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """How far other held-out documents of the same kind could have moved arm - parent.

    Percentile bootstrap (Efron 1979): each domain's documents are drawn again with replacement,
    the same ones for arm and parent; the figure is the unweighted mean over domains of the
    difference in bits per byte. It knows nothing of seeds, and is short with few documents.

    Returns:
        (low, high) in bits per byte; None without domains, or if one has fewer than two documents.

    Raises:
        ValueError: a domain's lists differ in length, or hold a number that cannot be.
    """
    draws = np.random.default_rng(seed)
    differences = []
    for domain, losses in per_document.items():
        arm_D, parent_D, bytes_D = _documents(domain, losses)
        if len(bytes_D) < 2:
            return None
        differences.append(_resampled(arm_D - parent_D, bytes_D, n_resamples, draws))
    if not differences:
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(np.mean(differences, axis=0), [tail, 1 - tail])
    return float(low), float(high)


def _resampled(
    bits_D: Floats, bytes_D: Floats, n_resamples: int, draws: np.random.Generator
) -> Floats:
    """Bits per byte of documents drawn with replacement, in blocks that bound the memory."""
    n_docs = len(bytes_D)
    rows = max(1, 2**21 // n_docs)
    blocks = []
    for start in range(0, n_resamples, rows):
        drawn = draws.integers(n_docs, size=(min(rows, n_resamples - start), n_docs))
        blocks.append(bits_D[drawn].sum(axis=-1) / bytes_D[drawn].sum(axis=-1))
    return np.concatenate(blocks)


def _documents(domain: str, losses: DocumentLosses) -> tuple[Floats, Floats, Floats]:
    arm_D, parent_D, bytes_D = (np.asarray(column, dtype=np.float64) for column in losses)
    if not len(arm_D) == len(parent_D) == len(bytes_D):
        raise ValueError(
            f"domain {domain!r} has {len(arm_D)} documents of the arm, {len(parent_D)} of its "
            f"parent and {len(bytes_D)} sizes: all three must be of the same documents"
        )
    if not (np.isfinite(arm_D).all() and np.isfinite(parent_D).all() and (bytes_D > 0).all()):
        raise ValueError(
            f"domain {domain!r} has a loss that is not finite or a document without bytes: "
            "leave failed arms and empty documents out"
        )
    return arm_D, parent_D, bytes_D


# The sentences.


@dataclass(frozen=True)
class _Words:
    """Verdicts with their sentences, in one study's units, margin and alpha."""

    units: str
    margin: float
    alpha: float

    def too_few(self, delta_N: Floats, versus: str) -> Verdict:
        n = len(delta_N)
        if n == 0:
            return Verdict("unsure", None, None, None, 0, f"unsure: no seed to set beside {versus}")
        mean = float(delta_N.mean())
        sentence = (
            f"unsure: the difference of {mean:+.4f} {self.units} from {versus} rests on "
            f"{_seeds(n)}, and a verdict needs {MIN_SEEDS} or more"
        )
        return Verdict("unsure", mean, None, None, n, sentence)

    def without_spread(self, delta_N: Floats, versus: str, rounding: float) -> Verdict:
        """Real seeds never agree to the last digit: equal runs are the same, others unproven."""
        n, mean = len(delta_N), float(delta_N.mean())
        if abs(mean) <= rounding:
            sentence = f"same: exactly as {versus} in all {_seeds(n)}"
            return Verdict("same", 0.0, (0.0, 0.0), 1.0, n, sentence)
        sentence = (
            f"unsure: the difference of {mean:+.4f} {self.units} from {versus} is the same to "
            f"the last digit in all {_seeds(n)}, so they do not show the noise: was the seed used?"
        )
        return Verdict("unsure", mean, None, None, n, sentence)

    def tested(
        self, versus: str, n: int, mean: float, half: float, p_value: float, n_arms: int
    ) -> Verdict:
        interval = (mean - half, mean + half)
        digits = max(0, 1 - math.floor(math.log10(half)))  # two of the half-width's
        confidence = f"{100 * (1 - self.alpha):g} % interval"
        corrected = f", corrected for {n_arms} arms" if n_arms > 1 else ""
        within = max(-interval[0], interval[1]) <= self.margin
        span = f"{interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}{corrected}, {_seeds(n)}"
        if p_value <= self.alpha:
            word = "better" if mean < 0 else "worse"
            low, high = sorted(abs(end) for end in interval)
            small = f"; less than the margin of {self.margin:g}" if within else ""
            sentence = (
                f"{word}: {abs(mean):.{digits}f} {self.units} {'lower' if mean < 0 else 'higher'} "
                f"than {versus} ({confidence} {low:.{digits}f} to {high:.{digits}f}"
                f"{corrected}, {_seeds(n)}){small}"
            )
        elif within:
            word = "same"
            sentence = (
                f"same: within +-{self.margin:g} {self.units} of {versus} ({confidence} {span})"
            )
        else:
            word = "unsure"
            sentence = (
                f"unsure: the difference of {mean:+.{digits}f} {self.units} from {versus} is "
                f"within the noise of {_seeds(n)} ({confidence} {span})"
            )
        return Verdict(word, mean, interval, p_value, n, sentence)


def _seeds(n: int) -> str:
    return f"{n} seed" if n == 1 else f"{n} seeds"


# Distributions, as arrays: numpy has none of them.


def student_t_two_sided(t: ArrayLike, df: ArrayLike) -> Floats:
    """P(|T| >= |t|) of Student's t with ``df`` degrees of freedom (any real number above 0)."""
    t, df = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(df, dtype=np.float64))
    square = t * t
    return _beta_ratio(
        df / 2, np.full_like(square, 0.5), df / (df + square), square / (df + square)
    )


def student_t_quantile(two_sided: ArrayLike, df: ArrayLike) -> Floats:
    """The t above 0 that |T| exceeds with probability ``two_sided``, between 0 and 1."""
    two_sided, df = np.broadcast_arrays(
        np.asarray(two_sided, dtype=np.float64), np.asarray(df, dtype=np.float64)
    )
    log_t = _bisect(lambda log_t: -student_t_two_sided(np.exp(log_t), df), -two_sided, -40.0, 80.0)
    return np.exp(log_t)


def _beta_ratio(a: Floats, b: Floats, x: Floats, rest: Floats) -> Floats:
    """Regularised incomplete beta I_x(a, b), with ``rest`` = 1 - x given for its precision.

    The continued fraction of DLMF 8.17.22, from the side where it converges fast (8.17.4).
    """
    swap = x * (a + b + 2) > a + 1
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    x, rest = np.where(swap, rest, x), np.where(swap, x, rest)
    with np.errstate(divide="ignore"):
        log_front = a * np.log(x) + b * np.log(rest) - np.log(a) - _log_beta(a, b)
    value = np.exp(log_front) * _beta_fraction(a, b, x)
    return np.where(swap, 1 - value, value)


def _beta_fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    """1 / (1 + d1 / (1 + d2 / (1 + ...))) by Lentz's method, to 1e-15."""
    c, d, value = np.ones_like(x), np.zeros_like(x), np.ones_like(x)
    for step in range(1, 1000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        value = value * c * d
        if np.all(np.abs(c * d - 1) < 1e-15):
            break
    return 1 / value


def _log_beta(a: Floats, b: Floats) -> Floats:
    return _lgamma(a) + _lgamma(b) - _lgamma(a + b)


_lgamma = np.vectorize(math.lgamma, otypes=[np.float64])


def _bisect(rising: Callable[[Floats], Floats], target: Floats, low: float, high: float) -> Floats:
    """Where ``rising`` reaches ``target``, element by element, to float64."""
    lows, highs = np.full_like(target, low), np.full_like(target, high)
    for _ in range(64):
        middle = (lows + highs) / 2
        below = rising(middle) < target
        lows, highs = np.where(below, middle, lows), np.where(below, highs, middle)
    return (lows + highs) / 2


def digamma(x: ArrayLike) -> Floats:
    """Derivative of log gamma, x above 0: DLMF 5.5.2 up by ten, then the series 5.11.2."""
    x = np.asarray(x, dtype=np.float64)
    y = x + 10
    z = y**-2
    series = z * (1 / 12 - z * (1 / 120 - z * (1 / 252 - z * (1 / 240 - z / 132))))
    return np.log(y) - 0.5 / y - series - sum(1 / (x + k) for k in range(10))


def trigamma(x: ArrayLike) -> Floats:
    """Derivative of ``digamma``, x above 0, by the derivatives of the same two formulas."""
    x = np.asarray(x, dtype=np.float64)
    y = x + 10
    z = y**-2
    series = z * (1 / 6 - z * (1 / 30 - z * (1 / 42 - z * (1 / 30 - z * 5 / 66)))) / y
    return 1 / y + 0.5 * z + series + sum((x + k) ** -2 for k in range(10))


def trigamma_inverse(y: ArrayLike) -> Floats:
    """The x above 0 with ``trigamma(x) == y``, for y from 1e-12 to 1e12."""
    y = np.asarray(y, dtype=np.float64)
    return np.exp(_bisect(lambda log_x: -trigamma(np.exp(log_x)), -y, -30.0, 30.0))
