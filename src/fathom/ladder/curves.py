"""The report's line charts: losses while training, and whatever a probe measured along an axis.

Fourteen arms in fourteen colours tell nobody anything. Here one arm is in front, its parent in ink,
the rest grey; the page lets the reader choose. The small panels show what the overlapping curves
hide: how far each arm is from its parent, seed by seed, as training goes on.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from fathom.ladder.charts import COUNT, Spec, ink, quiet, spec
from fathom.ladder.recorded import Arm, Study

Points = Sequence[tuple[float, float]]
CHANCE = "chance"  # a line that is no arm: what guessing gives
_MOST_POINTS = 60  # of one line: what a screen resolves, and what keeps the file small


def mean_curves(study: Study) -> dict[str, Points]:
    """``(tokens, bits per byte)`` of every arm that has curves, mean of its seeds, thinned."""
    found = {arm.name: _thin(_mean_curve(arm)) for arm in study.finished if arm.curves}
    return {name: points for name, points in found.items() if points}


def learning(study: Study) -> Spec | None:
    """Held-out loss while training, both axes logarithmic."""
    return lines(
        study,
        mean_curves(study),
        "Learning curves: held-out bits per byte against training tokens, mean of the seeds.",
        x="training tokens",
        y="bits per byte",
        log_y=True,
    )


def sweep(study: Study) -> Spec | None:
    """Held-out loss by learning rate, of the arms that were swept."""
    said = "Line chart: held-out bits per byte of each arm by learning rate."
    return lines(study, study.sweep, said, x="learning rate", y="bits per byte")


def front(study: Study, names: Sequence[str]) -> str:
    """The arm that a line chart shows in front at first: the best of those it has."""
    best = study.best.name if study.best else ""
    return best if best in names else names[0]


def lines(
    study: Study,
    arms: Mapping[str, Points],
    description: str,
    *,
    x: str,
    y: str,
    log_y: bool = False,
) -> Spec | None:
    """One line per arm; parameter ``chosen`` names the one in front. None without any point.

    x is logarithmic where it runs over four doublings or more (from its second place, if it starts
    at zero).
    """
    shown = {
        name: [(_short(a), _short(b)) for a, b in points if b > 0 or not log_y]
        for name, points in arms.items()
    }
    places = sorted({a for points in shown.values() for a, _ in points})
    heights = [b for points in shown.values() for _, b in points]
    if not places:
        return None
    axes = {
        "x": {"field": "x", "title": x, "type": "quantitative", **_x_axis(places)},
        "y": {"field": "y", "title": y, "type": "quantitative", "axis": {"tickCount": 6}},
    }
    axes["y"]["scale"] = _scale(heights, log=log_y)
    parents = {arm.name: arm.parent for arm in study.arms if arm.parent}
    params = [
        {"name": "chosen", "value": front(study, list(arms))},
        {"name": "parents", "value": parents},
    ]
    detail = {"field": "arm", "type": "nominal"}
    dash = {"condition": {"test": f"datum.arm === '{CHANCE}'", "value": [4, 3]}, "value": [1, 0]}
    tooltip = [
        {"field": "arm", "type": "nominal"},
        {"field": "x", "type": "quantitative", "title": x, "format": ".4~s"},
        {"field": "y", "type": "quantitative", "title": y, "format": ".4f"},
    ]
    layers = [
        {
            "mark": quiet("line", strokeWidth=1, color=ink("faint")),
            "encoding": {**axes, "detail": detail, "strokeDash": dash},
        },
        *_in_front(axes, "parents[chosen]", "ink", "'parent: ' + parents[chosen]", below=14),
        *_in_front(axes, "chosen", "accent", "chosen", below=0),
        {
            "mark": quiet("point", filled=True, size=110, opacity=0),
            "encoding": {**axes, "tooltip": tooltip},
        },
    ]
    return spec(
        description,
        data={"values": [_row(points, arm=name) for name, points in shown.items()]},
        transform=[_FLAT],
        height=300,
        params=params,
        layer=layers,
    )


def gaps(study: Study) -> Spec | None:
    """Arm minus parent while training, one small panel per step, one line per seed.

    Only points that both runs of a seed evaluated after the same number of tokens are compared. The
    scale fits the second half of training; what is larger before it is cut off.
    """
    rows, late = [], []
    for arm in study.finished:
        for seed, points in _gaps(arm, study.arm(arm.parent)).items():
            rows.append(_row(points, arm=arm.name, seed=seed))
            late += [abs(b) for _, b in points[len(points) // 2 :]]
    if not rows:
        return None
    margin = study.margin or 0.0
    reach = max(1.25 * max(late), 1.5 * margin) or 1.0
    y = {"type": "quantitative", "scale": {"domain": [-reach, reach]}}
    y["axis"] = {"title": None, "tickCount": 3, "format": "+.2~g", "grid": False}
    x: Spec = {"field": "x", "type": "quantitative"}
    x["axis"] = {"title": None, "tickCount": 2, "grid": False, "labelExpr": COUNT}
    band = {"values": [{"low": -margin, "high": margin, "zero": 0}]}
    layers = [
        {
            "data": band,
            "mark": quiet("rect", color=ink("line"), opacity=0.55),
            "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}},
        },
        {
            "data": band,
            "mark": quiet("rule", color=ink("faint")),
            "encoding": {"y": {"field": "zero", **y}},
        },
        {
            "mark": quiet("line", clip=True, color=ink("accent"), strokeWidth=1.25),
            "encoding": {
                "x": x,
                "y": {"field": "y", **y},
                "detail": {"field": "seed", "type": "nominal"},
            },
        },
    ]
    order = [arm.name for arm in study.arms]
    header = {"title": None, "labelAnchor": "start", "labelLimit": 120}
    return spec(
        "Small panels: arm minus parent in bits per byte against training tokens, a line per seed.",
        width=None,
        data={"values": rows},
        transform=[_FLAT],
        facet={"field": "arm", "type": "nominal", "sort": order, "header": header},
        columns=5,
        spacing={"row": 18, "column": 24},
        spec={"width": 120, "height": 90, "layer": layers},
    )


_FLAT: Spec = {"flatten": ["x", "y"]}  # a row is a whole line: names are not repeated


def _row(points: Points, **names: str) -> Spec:
    return {**names, "x": [x for x, _ in points], "y": [_short(y) for _, y in points]}


def _scale(values: Sequence[float], *, log: bool) -> Spec:
    """Of all lines, also those that are not in front; a little room on a linear one."""
    low, high = min(values), max(values)
    room = 0 if log else 0.04 * (high - low) or 0.1
    return {"type": "log" if log else "linear", "domain": [low - room, high + room], "nice": False}


def _x_axis(places: Sequence[float]) -> Spec:
    """Few places are the ticks themselves."""
    start = places[1] if len(places) > 1 and places[0] == 0 else places[0]
    log = start > 0 and places[-1] >= 16 * start
    scale = _scale(places, log=log)
    if log and places[0] == 0:
        scale |= {"type": "symlog", "constant": start}
    ticks = {"values": list(places)} if len(places) <= 10 else {"tickCount": 6}
    labels = {"labelExpr": COUNT, "labelOverlap": True, "labelSeparation": 6}
    return {"scale": scale, "axis": {"grid": False, **labels, **ticks}}


def _in_front(axes: Spec, arm: str, colour: str, name: str, *, below: int) -> list[Spec]:
    """The line of the arm that a Vega expression gives, and its name at the top right."""
    said = {"expr": f"isValid({arm}) ? {name} : ''"}
    text = {"align": "right", "baseline": "top", "fontWeight": 600, "limit": 260}
    return [
        {
            "transform": [{"filter": f"datum.arm === {arm}"}],
            "mark": quiet("line", strokeWidth=2, color=ink(colour)),
            "encoding": axes,
        },
        {
            "data": {"values": [{}]},
            "mark": quiet("text", color=ink(colour), text=said, **text),
            "encoding": {"x": {"value": "width"}, "y": {"value": below}},
        },
    ]


def _mean_curve(arm: Arm) -> Points:
    """Mean over the seeds at every token count that all seeds evaluated."""
    seeds = [dict(zip(curve.tokens, curve.bpb, strict=True)) for curve in arm.curves]
    shared = sorted(set.intersection(*map(set, seeds)))
    return [(tokens, fmean(seed[tokens] for seed in seeds)) for tokens in shared]


def _gaps(arm: Arm, parent: Arm | None) -> dict[str, Points]:
    """Arm minus parent for each seed that both have; nothing beside a parent that failed."""
    known = parent.curves if parent and parent.failed is None else ()
    before = {curve.seed: curve for curve in known}
    found = {}
    for curve in arm.curves:
        if curve.seed in before:
            old = dict(zip(before[curve.seed].tokens, before[curve.seed].bpb, strict=True))
            pairs = zip(curve.tokens, curve.bpb, strict=True)
            found[curve.seed] = _thin([(x, y - old[x]) for x, y in pairs if x in old])
    return {seed: points for seed, points in found.items() if points}


def _thin(points: Points) -> Points:
    """At most ``_MOST_POINTS`` of them, evenly, first and last kept."""
    if len(points) <= _MOST_POINTS:
        return points
    stride = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(index * stride)] for index in range(_MOST_POINTS)]


def _short(value: float) -> float:
    """Five significant digits: more than a screen shows, half the bytes."""
    return float(f"{value:.5g}")
