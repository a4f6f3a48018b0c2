"""A finished study as ``results.json`` records it, read at the border into plain typed values.

The report must also draw what an older version wrote, what a failed arm left behind, and numbers
that never came out: anything missing, of another type, NaN or infinite reads as None (or empty).
Only a file that is no JSON object, or has no arms, is refused.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Word = Literal["better", "same", "worse", "unsure"]
WORDS: tuple[Word, ...] = ("better", "same", "worse", "unsure")
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One config key in which an arm differs from its parent, and what accounts for it."""

    key: str
    parent: str
    arm: str
    mark: str  # named, fit, tuned or extra; empty: not recorded


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One training run of an arm; ``by_domain`` and ``val_bpb`` in bits per byte."""

    seed: str
    val_bpb: float | None
    by_domain: dict[str, float]
    lr: float | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out bits per byte of one seed after so many training tokens, rising."""

    seed: str
    tokens: tuple[float, ...]
    bpb: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a step did: ``delta`` is arm minus parent in bits per byte, so negative is better."""

    word: Word
    delta: float | None
    interval: Interval | None
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of the study. ``failed`` is the reason, or None for an arm that finished."""

    name: str
    parent: str | None
    claim: str
    differs: tuple[Difference, ...]
    seeds: tuple[Seed, ...]
    mean: float | None
    std: float | None
    n: int
    by_domain: dict[str, float]
    symbols: dict[str, float]  # image domains, in bits per symbol
    params: float | None
    active_params: float | None
    flops_per_token: float | None
    cache_bytes_per_token: float | None
    tokens: float | None
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    lr: float | None
    curves: tuple[Curve, ...]
    evaluation_interval: Interval | None
    probes: Mapping[str, object]
    verdict: Verdict | None
    failed: str | None

    @property
    def extras(self) -> int:
        """How many keys differ that nothing accounts for: more than the named change."""
        return sum(difference.mark == "extra" for difference in self.differs)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """What a compressor or a counting model needs on the same held-out bytes."""

    mean: float | None
    by_domain: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The whole file. ``domains`` maps a domain to the numbers recorded about its data."""

    name: str
    title: str
    question: str
    hold: str
    budget: str
    margin: float | None
    source: str
    fingerprint: str
    domains: dict[str, dict[str, float]]
    env: dict[str, str]
    anchors: dict[str, Anchor]
    learned: str
    detectable: str
    commands: tuple[str, ...]
    lr_note: str
    sweep: dict[str, tuple[tuple[float, float], ...]]  # arm: learning rates and their losses
    arms: tuple[Arm, ...]

    @property
    def root(self) -> Arm:
        """The arm that all others descend from."""
        return next((arm for arm in self.arms if arm.parent is None), self.arms[0])

    @property
    def finished(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.failed is None and arm.mean is not None]

    @property
    def best(self) -> Arm | None:
        """The finished arm with the lowest held-out loss; None when every arm failed."""
        return min(self.finished, key=lambda arm: arm.mean or math.inf, default=None)

    def arm(self, name: str | None) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)


def read_study(folder: Path) -> Study:
    """Read ``folder/results.json``.

    Raises:
        ValueError: the file is missing, no JSON object, or lists no arms.
    """
    path = folder / "results.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give the folder that fathom ladder wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run fathom ladder again") from None
    arms = [_arm(item) for item in items(table(data).get("arms")) if isinstance(item, dict)]
    if not arms:
        raise ValueError(f"{path} lists no arms: run fathom ladder again to fill it")
    return _study(table(data), arms)


def _study(data: Mapping[str, object], arms: Sequence[Arm]) -> Study:
    budget, about = table(data.get("budget")), table(data.get("data"))
    hold, value = text(budget.get("hold")), number(budget.get("value"))
    name, sweep = text(data.get("study"), "study"), table(table(data.get("lr")).get("sweep"))
    return Study(
        name=name,
        title=text(data.get("title"), name),
        question=text(data.get("question")),
        hold=hold,
        budget=text(budget.get("sentence"), f"{hold} = {value:,.10g}" if value else hold),
        margin=number(data.get("margin")),
        source=text(about.get("source")),
        fingerprint=text(about.get("fingerprint")),
        domains={key: numbers(item) for key, item in table(about.get("domains")).items()},
        env={key: text(item) for key, item in table(data.get("env")).items() if text(item)},
        anchors={
            key: Anchor(
                mean=number(table(item).get("mean")),
                by_domain=numbers(table(item).get("by_domain")),
            )
            for key, item in table(data.get("anchors")).items()
        },
        learned=text(table(data.get("learned")).get("sentence")),
        detectable=text(table(data.get("detectable")).get("sentence")),
        commands=tuple(text(item) for item in items(data.get("commands")) if text(item)),
        lr_note=text(data.get("lr_note")),
        sweep={arm: points for arm, item in sweep.items() if (points := _points(table(item)))},
        arms=tuple(arms),
    )


def _arm(data: Mapping[str, object]) -> Arm:
    score = table(data.get("val_bpb"))
    seeds = tuple(_seed(table(item)) for item in items(data.get("seeds")))
    failed = data.get("failed")
    n = number(score.get("n"))
    return Arm(
        name=text(data.get("name"), "unnamed"),
        parent=text(data.get("parent")) or None,
        claim=text(data.get("claim")),
        differs=tuple(
            map(_difference, items(data.get("differences")) or items(data.get("differs")))
        ),
        seeds=seeds,
        mean=number(score.get("mean")),
        std=number(score.get("std")),
        n=len(seeds) if n is None else int(n),
        by_domain=numbers(score.get("by_domain")),
        symbols=numbers(data.get("symbols")),
        params=number(data.get("params")),
        active_params=number(data.get("active_params")),
        flops_per_token=number(data.get("flops_per_token")),
        cache_bytes_per_token=number(data.get("cache_bytes_per_token")),
        tokens=number(data.get("tokens")),
        tokens_per_second=number(data.get("train_tokens_per_second")),
        peak_memory_bytes=number(data.get("peak_memory_bytes")),
        lr=number(data.get("lr")),
        curves=tuple(_curves(items(data.get("curves")))),
        evaluation_interval=interval(data.get("evaluation_interval")),
        probes=table(data.get("probes")),
        verdict=_verdict(table(data.get("verdict"))),
        failed=text(failed, "no reason was recorded") if failed else None,
    )


def _verdict(data: Mapping[str, object]) -> Verdict | None:
    if not data:
        return None
    words: dict[str, Word] = {word: word for word in WORDS}
    return Verdict(
        word=words.get(text(data.get("verdict")), "unsure"),
        delta=number(data.get("delta_bpb")),
        interval=interval(data.get("interval")),
        sentence=text(data.get("sentence")),
    )


def _difference(item: object) -> Difference:
    data = table(item) or {"key": item}  # "differs" may hold bare keys
    return Difference(
        key=text(data.get("key")),
        parent=_setting(data.get("parent")),
        arm=_setting(data.get("arm")),
        mark=text(data.get("mark") or data.get("why")),
    )


def _seed(data: Mapping[str, object]) -> Seed:
    return Seed(
        seed=text(data.get("seed"), "?"),
        val_bpb=number(data.get("val_bpb")),
        by_domain=numbers(data.get("by_domain")),
        lr=number(data.get("lr")),
    )


def _curves(curves: Iterable[object]) -> Iterable[Curve]:
    for curve in map(table, curves):
        pairs = zip(items(curve.get("tokens")), items(curve.get("bpb")), strict=False)
        points = [(number(x), number(y)) for x, y in pairs]
        kept = sorted({x: y for x, y in points if x is not None and y is not None}.items())
        if kept:
            tokens, bpb = zip(*kept, strict=True)
            yield Curve(seed=text(curve.get("seed"), "?"), tokens=tokens, bpb=bpb)


def _points(data: Mapping[str, object]) -> tuple[tuple[float, float], ...]:
    pairs = [[number(value) for value in items(point)] for point in items(data.get("points"))]
    return tuple((a, b) for a, b, *_ in (pair + [None] * 2 for pair in pairs) if a and b)


def _setting(value: object) -> str:
    """A config value as its owner would write it; None: the key is absent."""
    if value is None:
        return "absent"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number(value: object) -> float | None:
    """A finite number, else None. True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def numbers(value: object) -> dict[str, float]:
    found = {key: number(item) for key, item in table(value).items()}
    return {key: item for key, item in found.items() if item is not None}


def interval(value: object) -> Interval | None:
    ends = [number(item) for item in items(value)]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return min(ends[0], ends[1]), max(ends[0], ends[1])


def text(value: object, default: str = "") -> str:
    missing = (
        value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))
    )
    return default if missing else str(value)


def table(value: object) -> dict[str, object]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def items(value: object) -> list[object]:
    return value if isinstance(value, list) else []
