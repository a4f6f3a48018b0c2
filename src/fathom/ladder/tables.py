"""The report's sentences and tables: numbers as people read them, rows as the page shows them.

Nothing here knows HTML; the template escapes every string it gets.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fathom.ladder.curves import Points
from fathom.ladder.recorded import WORDS, Arm, Study, number

NONE = "–"  # noqa: RUF001 (a dash where there is no number)

WHY = {  # what is held equal: what that favours
    "tokens": "An arm that spends more computation per token is favoured: read its loss beside its "
    "FLOPs per token.",
    "active_flops": "A cheaper arm sees more text, so its price per token is already part of its "
    "loss; the text an arm needs is not held equal.",
    "params": "No arm wins by being larger, but one may still spend more computation per token or "
    "keep a larger cache.",
    "wall_time": "Speed on this machine decides how much text an arm sees: on other hardware, or "
    "with other kernels, the order can change.",
    "cache_bytes": "No arm wins by remembering more per token; arms may still differ in parameters "
    "and in computation.",
}
ANCHORS = {"xz": "xz", "order2": "order-2 model"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell's text, and its shade from -1 (much lower, better) to 1 (much higher, worse)."""

    text: str
    shade: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of ``(row header, cells)`` under ``head``, whose first entry names the row headers."""

    caption: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def answer(study: Study) -> list[str]:
    """The study's result in a few sentences."""
    steps = [arm for arm in study.arms if arm.parent]
    best = study.best
    if best is None or best.mean is None:
        return ["No arm finished, so there is nothing to compare. The reasons are below."]
    spread = f" ± {best.std:.3f} over {best.n} seeds" if best.std is not None else ""
    said = f"The best arm is {best.name} at {best.mean:.3f} bits per byte{spread}"
    start = study.root.mean
    if best is study.root:
        said += ", where the ladder starts: no later arm is below it." if steps else "."
    elif start is not None:
        said += f", {start - best.mean:.3f} below {study.root.name}, where the ladder starts."
    else:
        said += "."
    return [_steps(study, len(steps)), said, *_scale(study, best.mean)]


def _steps(study: Study, steps: int) -> str:
    if not steps:
        return "This study has one arm and so no step to judge."
    margin = f" within {study.margin:g} bits per byte" if study.margin else ""
    words = {
        "better": "better than the parent",
        "same": "the same" + margin,
        "worse": "worse",
        "unsure": "unsure: these seeds cannot tell",
        "failed": "failed",
        "open": "without a verdict",
    }
    counts = count_verdicts(study)
    parts = [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]
    return (
        f"Of {steps} step{'s' if steps > 1 else ''} from an arm to its child: {'; '.join(parts)}."
    )


def _scale(study: Study, best: float) -> list[str]:
    """What the best arm's figure is worth, beside two models that everyone can picture."""
    means = {name: anchor.mean for name, anchor in study.anchors.items()}
    xz, order2 = means.get("xz"), means.get("order2")
    said = []
    if xz is not None:
        said.append(f"For scale: xz compresses the same held-out text to {xz:.3f} bits per byte.")
    if order2 is not None:
        below = (
            "the best arm is below it, so it has learnt more than that."
            if best < order2
            else "not even the best arm is below it: read every verdict here with that in mind."
        )
        said.append(
            "A model that only counts which byte follows which two in the training text needs "
            f"{order2:.3f}; {below}"
        )
    elif study.learned:
        said.append(study.learned)
    return said


def count_verdicts(study: Study) -> dict[str, int]:
    """Arms by ``outcome``, without the one where the ladder starts."""
    found = [outcome(arm) for arm in study.arms]
    return {word: found.count(word) for word in (*WORDS, "failed", "open")}


def outcome(arm: Arm) -> str:
    """One word for an arm's row: a verdict's, ``failed``, ``start``, or ``open`` for no verdict."""
    if arm.failed is not None:
        return "failed"
    if arm.verdict:
        return arm.verdict.word
    return "open" if arm.parent else "start"


def domain_table(study: Study) -> Table | None:
    """Bits per byte by domain, shaded by the difference to the first arm; images at the end."""
    arms, root = study.finished, study.root
    images = keys(arm.symbols for arm in arms)
    domains = [key for key in keys(arm.by_domain for arm in arms) if key not in images]
    if not domains and not images:
        return None
    gaps = {
        (arm.name, d): arm.by_domain[d] - root.by_domain[d]
        for arm in arms
        for d in domains
        if d in arm.by_domain and d in root.by_domain
    }
    widest = max(map(abs, gaps.values()), default=0.0) or 1.0
    rows = [
        (
            arm.name,
            [Cell(text=fixed(arm.mean))]
            + [
                Cell(text=fixed(arm.by_domain.get(d)), shade=gaps.get((arm.name, d), 0.0) / widest)
                for d in domains
            ]
            + [Cell(text=fixed(arm.symbols.get(d))) for d in images],
        )
        for arm in arms
    ]
    for name, anchor in study.anchors.items():
        values = [anchor.mean, *(anchor.by_domain.get(d) for d in [*domains, *images])]
        rows.append((ANCHORS.get(name, words(name)), [Cell(text=fixed(value)) for value in values]))
    head = ["arm", "mean", *domains, *(f"{d} (bits per symbol)" for d in images)]
    return Table(caption="Held-out loss by domain, bits per byte", head=head, rows=rows)


def seed_table(study: Study) -> Table | None:
    """Every run's figure, the spread between seeds, and the evaluation's own uncertainty."""
    seeds = list(dict.fromkeys(seed.seed for arm in study.arms for seed in arm.seeds))
    rows = []
    for arm in study.arms:
        by_seed = {seed.seed: seed.val_bpb for seed in arm.seeds}
        ends = arm.evaluation_interval
        values = [*map(by_seed.get, seeds), arm.mean, arm.std]
        cells = [Cell(text=fixed(value, 4)) for value in values]
        cells.append(Cell(text=f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else NONE))
        rows.append((arm.name, cells))
    head = [
        "arm",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "std of seeds",
        "evaluation interval",
    ]
    return Table(caption="Held-out bits per byte of every run", head=head, rows=rows)


def rate_table(study: Study) -> Table | None:
    """Each arm's learning rate."""
    rows = [(arm.name, [Cell(text=f"{arm.lr:.4g}")]) for arm in study.arms if arm.lr is not None]
    head = ["arm", "learning rate"]
    return Table(caption="Peak learning rate of each arm", head=head, rows=rows) if rows else None


def line_table(lines: Mapping[str, Points], caption: str) -> Table:
    """The numbers of a line chart at up to eight places, the last among them."""
    places = sorted({place for points in lines.values() for place, _ in points})
    step = max(1, math.ceil(len(places) / 8))
    shown = places[::-1][::step][::-1]
    rows = [
        (name, [Cell(text=fixed(dict(points).get(place), 4)) for place in shown])
        for name, points in lines.items()
    ]
    return Table(caption=caption, head=["arm", *map(si, shown)], rows=rows)


def ratio_table(ratios: Mapping[str, Sequence[float]], caption: str, name: str) -> Table:
    """The numbers of a heat map of expert loads."""
    widest = max(map(len, ratios.values()), default=0)
    rows = [(row, [Cell(text=fixed(ratio, 2)) for ratio in loads]) for row, loads in ratios.items()]
    head = [name, *(f"expert {expert}" for expert in range(widest))]
    return Table(caption=caption, head=head, rows=rows)


def figure_table(caption: str, figures: Mapping[str, Mapping[str, object]]) -> Table | None:
    """Arms down, figures across; the numbers of a column share one format. None without figures."""
    names = keys(figures.values())
    if not names:
        return None
    columns = [_column(name, [got.get(name) for got in figures.values()]) for name in names]
    rows = [
        (arm, [Cell(text=column[row]) for column in columns]) for row, arm in enumerate(figures)
    ]
    return Table(caption=caption, head=["arm", *names], rows=rows)


def _column(name: str, values: Sequence[object]) -> list[str]:
    found = [number(value) for value in values]
    known = [abs(value) for value in found if value is not None]
    if "bytes" in name.split():
        show = functools.partial(si, unit="B")
    elif all(value == int(value) for value in known):
        show = functools.partial(fixed, digits=0)
    else:  # four digits of the largest
        digits = 3 - math.floor(math.log10(max(known)))
        show = functools.partial(fixed, digits=min(max(digits, 0), 6))
    return [
        show(got) if got is not None else value if isinstance(value, str) else NONE
        for got, value in zip(found, values, strict=True)
    ]


def keys(tables: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys, in the order in which they first appear."""
    return list(dict.fromkeys(itertools.chain.from_iterable(tables)))


def words(key: str) -> str:
    """A machine's name as people write it."""
    return key.replace("_", " ").replace("bpb", "bits per byte").strip()


def fixed(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def signed(value: float | None) -> str:
    """Four decimals with a sign, minus as a minus."""
    return NONE if value is None else f"{value:+.4f}".replace("-", "−")  # noqa: RUF001


def si(value: float | None, unit: str = "") -> str:
    """Three significant digits with k, M, G, T: ``1.23 M``; bytes count in thousands too."""
    if value is None:
        return NONE
    value = float(f"{value:.3g}")
    power = max(0, min(5, math.floor(math.log10(abs(value)) / 3))) if value else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}".strip()
