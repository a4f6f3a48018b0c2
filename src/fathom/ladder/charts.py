"""The report's charts as Vega-Lite specs: plain data that a page, a test or a PNG can take.

Colours are Vega parameters that hold the light theme's values; the page sets those its style sheet
names. So one spec serves both themes, and the table below is all there is to colour. A spec's
``width: container`` is a number wherever there is no container.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fathom.ladder.recorded import WORDS, Arm, Study

Spec = dict[str, Any]

COLOURS: dict[str, tuple[str, str]] = {  # name: light, dark
    "page": ("#ffffff", "#121517"),
    "panel": ("#f4f6f8", "#1c2024"),
    "line": ("#dfe4e8", "#2c3338"),
    "faint": ("#86929c", "#6b7781"),
    "muted": ("#57626c", "#9ba7b0"),
    "ink": ("#1b2025", "#e4e8eb"),
    "accent": ("#0a5fb4", "#6fb3f2"),
    "worse": ("#b0450c", "#ef9a5d"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
COUNT = "format(datum.value, datum.value < 1e4 ? ',' : '~s')"  # an axis label: 4,096 and 20k
_SHAPES = ["triangle-down", "square", "triangle-up", "circle", "diamond"]  # as WORDS, then start
_INKS = ["accent", "muted", "worse", "faint", "ink"]
_POINT: Spec = {"type": "point", "filled": True, "size": 90, "opacity": 1}
_LABEL_HEIGHT, _LABEL_WIDTH = 15, 102
_ROW = 24


def ink(name: str) -> Spec:
    """A colour of ``COLOURS`` in the theme that is on."""
    return {"expr": name}


def quiet(kind: str, **style: Any) -> Spec:
    """A mark that tells a screen reader nothing: the chart's description and its table do."""
    return {"type": kind, "aria": False, **style}


def forest(study: Study) -> Spec | None:
    """Each step's difference to its parent with its interval, over the band that counts as same."""
    rows = [row for arm in study.arms if (row := _step(arm))]
    if not rows:
        return None
    x: Spec = {"type": "quantitative", "title": "bits per byte, arm minus parent"}
    x |= {"axis": {"grid": False, "tickCount": 8}, "scale": {"padding": 12}}
    y = {"field": "step", "type": "nominal", "sort": None, "title": None}
    margin = study.margin or 0.0
    colour = _by_verdict("color", WORDS)
    tooltip = _tooltip(step="step", verdict="verdict", difference="delta:+.4f", interval="interval")
    layers = [
        {
            "data": {"values": [{"low": -margin, "high": margin}]},
            "mark": quiet("rect", color=ink("line"), opacity=0.55),
            "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}},
        },
        {
            "data": {"values": [{"zero": 0}]},
            "mark": quiet("rule", color=ink("muted")),
            "encoding": {"x": {"field": "zero", **x}},
        },
        {
            "mark": quiet("rule", strokeWidth=2),
            "encoding": {
                "y": y,
                "x": {"field": "low", **x},
                "x2": {"field": "high"},
                "color": colour,
            },
        },
        {
            "mark": _POINT,
            "encoding": {
                "y": y,
                "x": {"field": "delta", **x},
                "color": colour,
                "shape": _by_verdict("shape", WORDS),
                "tooltip": tooltip,
            },
        },
    ]
    return spec(
        "Forest plot: difference in bits per byte between each arm and its parent, with intervals.",
        data={"values": rows},
        height=_ROW * len(rows),
        layer=layers,
    )


def loss_against(study: Study, field: str, title: str, *, log: bool = False) -> Spec | None:
    """Held-out loss (mean, one standard deviation each way) of every arm against one cost.

    The thin line is the frontier: no arm below it costs less. Every arm is named at the right edge,
    at the height of its point or the nearest free one.
    """
    arms = [arm for arm in study.finished if (getattr(arm, field) or 0) > 0]
    if not arms:
        return None
    height = max(320, _LABEL_HEIGHT * len(arms))
    rows, domain = _costs(arms, field, height)
    scale = {"type": "log", "nice": False} if log else {"zero": False}
    x = {"field": "cost", "type": "quantitative", "title": title, "scale": {**scale, "padding": 16}}
    x["axis"] = {"labelExpr": COUNT, "tickCount": 4, "grid": False}
    y: Spec = {"type": "quantitative", "title": "bits per byte"}
    y["scale"] = {"domain": domain, "nice": False}
    loss, label = {"field": "loss", **y}, {"field": "label", **y}
    words = [*WORDS, "start"]
    tooltip = _tooltip(
        arm="arm", verdict="verdict", loss="loss:.4f", std="std:.4f", cost="cost:.4~s"
    )
    layers = [
        {
            "mark": quiet("rule", color=ink("line")),
            "encoding": {"x": x, "x2": {"value": "width"}, "y": loss, "y2": {"field": "label"}},
        },
        {
            "data": {"values": frontier([(row["cost"], row["loss"]) for row in rows])},
            "mark": quiet(
                "line", interpolate="step-after", color=ink("accent"), strokeWidth=1, opacity=0.5
            ),
            "encoding": {"x": x, "y": loss},
        },
        {
            "mark": quiet("rule", color=ink("faint")),
            "encoding": {"x": x, "y": {"field": "low", **y}, "y2": {"field": "high"}},
        },
        {
            "mark": {**_POINT, "stroke": ink("page"), "strokeWidth": 1},
            "encoding": {
                "x": x,
                "y": loss,
                "color": _by_verdict("color", words),
                "shape": _by_verdict("shape", words),
                "tooltip": tooltip,
            },
        },
        {
            "mark": quiet("text", align="left", dx=6, limit=_LABEL_WIDTH, color=ink("ink")),
            "encoding": {"x": {"value": "width"}, "y": label, "text": {"field": "arm"}},
        },
    ]
    return spec(
        f"Scatter plot: held-out bits per byte of each arm against {title}.",
        data={"values": rows},
        height=height,
        layer=layers,
    )


def experts(description: str, ratios: Mapping[str, Sequence[float]], title: str) -> Spec:
    """Heat map of expert loads as ratios to the fair share (1.0), one row per key of ``ratios``."""
    rows = [
        {
            "row": row,
            "expert": list(range(len(loads))),
            "ratio": [round(ratio, 3) for ratio in loads],
        }
        for row, loads in ratios.items()
    ]
    scale = {
        "type": "linear",
        "domain": [0, 1, 2],
        "range": [ink("accent"), ink("panel"), ink("worse")],
        "interpolate": "rgb",
        "clamp": True,
    }
    legend = {"title": "fair shares", "gradientLength": 84, "values": [0, 1, 2]}
    axis = {"labelOverlap": True, "labelAngle": 0, "grid": False}
    return spec(
        description,
        data={"values": rows},
        transform=[{"flatten": ["expert", "ratio"]}],
        height=_ROW * len(ratios),
        mark=quiet("rect", stroke=ink("page"), strokeWidth=1.5),
        encoding={
            "x": {"field": "expert", "type": "ordinal", "title": "expert", "axis": axis},
            "y": {"field": "row", "type": "ordinal", "sort": None, "title": title, "axis": axis},
            "color": {"field": "ratio", "type": "quantitative", "scale": scale, "legend": legend},
            "tooltip": _tooltip(**{title: "row", "expert": "expert", "ratio": "ratio:.2f"}),
        },
    )


def divergence(rows: Sequence[tuple[str, float, float | None]]) -> Spec | None:
    """How differently the domains use the experts, beside the same figure with shuffled labels.

    Args:
        rows: arm, divergence, divergence with shuffled labels.
    """
    if not rows:
        return None
    y = {"field": "arm", "type": "nominal", "sort": None, "title": None}
    x: Spec = {"type": "quantitative", "title": "divergence between domains"}
    x["axis"] = {"tickCount": 6, "grid": False}
    tooltip = _tooltip(arm="arm", divergence="real:.4f", shuffled="shuffled:.4f")
    layers = [
        {
            "mark": quiet("rule", color=ink("line"), strokeWidth=2),
            "encoding": {"y": y, "x": {"field": "shuffled", **x}, "x2": {"field": "real"}},
        },
        *(
            {
                "mark": {**_POINT, "filled": filled, "color": ink(colour)},
                "encoding": {"y": y, "x": {"field": field, **x}, "tooltip": tooltip},
            }
            for field, filled, colour in (("shuffled", False, "muted"), ("real", True, "accent"))
        ),
    ]
    return spec(
        "Dot plot: expert-by-domain divergence of each arm, filled; with shuffled labels, hollow.",
        data={"values": [dict(zip(("arm", "real", "shuffled"), row, strict=True)) for row in rows]},
        height=_ROW * len(rows),
        layer=layers,
    )


def apart(wanted: Sequence[float], low: float, high: float, line: float) -> list[float]:
    """Places for labels, at least ``line`` apart within ``low`` to ``high``.

    ``wanted`` rises, and so do the places. They are nearest to it in least squares: neighbours that
    would clash share the mean of what they want.
    """
    blocks: list[list[float]] = []
    for index, place in enumerate(wanted):
        blocks.append([place - index * line])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    most = high - line * (len(wanted) - 1)
    starts = [min(max(fmean(block), low), most) for block in blocks for _ in block]
    return [start + index * line for index, start in enumerate(starts)]


def frontier(points: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """The ``(cost, loss)`` than which none is both cheaper and lower, by rising cost."""
    found: list[dict[str, float]] = []
    for cost, loss in sorted(points):
        if not found or loss < found[-1]["loss"]:
            found.append({"cost": cost, "loss": loss})
    return found


def spec(description: str, *, width: str | None = "container", **parts: Any) -> Spec:
    """A Vega-Lite spec with our colours as parameters, our typography and a text alternative."""
    colours = [{"name": name, "value": light} for name, (light, _) in COLOURS.items()]
    size = {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}} if width else {}
    params = colours + parts.pop("params", [])
    return {"description": description, **size, **parts, "params": params, "config": _config()}


def _config() -> Spec:
    text = {"titleColor": ink("muted"), "titleFontWeight": "normal", "titleFontSize": 12}
    lines = {key: ink("line") for key in ("gridColor", "domainColor", "tickColor")}
    padding = {"titlePadding": 10, "labelPadding": 6, "labelLimit": 170}
    return {
        "font": FONT,
        "background": "transparent",
        "view": {"stroke": None},
        "axis": {**text, **lines, **padding, "labelColor": ink("muted"), "labelFontSize": 11.5},
        "legend": {**text, "labelColor": ink("ink"), "labelFontSize": 12, "titleLimit": 120},
        "header": {"labelColor": ink("ink"), "labelFontSize": 12},
        "text": {"fontSize": 11.5},
    }


def _by_verdict(channel: str, words: Sequence[str]) -> Spec:
    """Colour and shape say the same, so neither is needed alone."""
    values = _SHAPES if channel == "shape" else [ink(name) for name in _INKS]
    return {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(words), "range": values[: len(words)]},
        "legend": {"title": None, "orient": "top", "direction": "horizontal", "symbolSize": 90},
    }


def _tooltip(**fields: str) -> list[Spec]:
    """``title="field:format"`` to Vega-Lite's tooltip channel."""
    rows = []
    for title, field in fields.items():
        name, _, form = field.partition(":")
        kind = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
        rows.append({"field": name, "title": title, **kind})
    return rows


def _step(arm: Arm) -> Spec | None:
    verdict = arm.verdict
    if verdict is None or verdict.delta is None:
        return None
    low, high = verdict.interval or (verdict.delta, verdict.delta)
    return {
        "step": f"{arm.name} from {arm.parent}",
        "verdict": verdict.word,
        "delta": verdict.delta,
        "low": low,
        "high": high,
        "interval": f"{low:+.4f} to {high:+.4f}" if verdict.interval else "not stated",
    }


def _costs(arms: Sequence[Arm], field: str, height: int) -> tuple[list[Spec], list[float]]:
    """Rows with the places of their labels, and the loss axis' domain, which holds them all."""
    rows = sorted((_cost(arm, field) for arm in arms), key=lambda row: row["loss"])
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    room = 0.06 * (high - low) or 0.01
    low, high = low - room, high + room
    places = apart([row["loss"] for row in rows], low, high, (high - low) * _LABEL_HEIGHT / height)
    return [{**row, "label": y} for row, y in zip(rows, places, strict=True)], [low, high]


def _cost(arm: Arm, field: str) -> Spec:
    assert arm.mean is not None
    std = arm.std or 0.0
    return {
        "arm": arm.name,
        "verdict": arm.verdict.word if arm.verdict else "unsure" if arm.parent else "start",
        "cost": getattr(arm, field),
        "loss": arm.mean,
        "std": arm.std,
        "low": arm.mean - std,
        "high": arm.mean + std,
    }
