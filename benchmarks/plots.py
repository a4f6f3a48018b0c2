"""Draw the plots of ``docs/performance.md`` and ``docs/scaling.md`` from a GPU's newest records.

python benchmarks/plots.py [--device h100]

Blue is ours, grey are the others, dashed is what the machine allows by the same run's limits.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vl_convert

HERE = Path(__file__).parent
PLOTS = HERE.parent / "docs" / "performance"
BLUE, GREYS = "#0a5fb4", ["#8a949c", "#b9a15a", "#a56a5c", "#7b8f63", "#9a7ea8"]
LIMIT = "roofline"
Record = dict[str, Any]
Chart = dict[str, Any]


def newest(benchmark: str, device: str) -> Record | None:
    files = sorted((HERE / "results").glob(f"{benchmark}-{device}-*.json"))
    return json.loads(files[-1].read_text()) if files else None


def everyone(line: dict[str, Any]) -> dict[str, float]:
    return {"ours": line["ours"], **line["peers"]}


def bars(record: Record, metric: str, axis: str, *, limited: bool = False) -> Chart:
    """A group of bars a case: ours first, then the peers; the dashed line is a square product."""
    values = [
        {"case": line["case"], "who": who, "value": value}
        for line in record["rows"]
        if line["metric"] == metric and not line["case"].endswith(("-eager", "-graph"))
        for who, value in everyone(line).items()
    ]
    return bar_chart(values, axis, record["limits"]["gemm_tflops"] if limited else None)


def passes(record: Record) -> Chart:
    """What every pass of the expert layer takes."""
    values = [
        {"case": case, "who": name, "value": value}
        for case, parts in record["passes"].items()
        for name, value in parts.items()
    ]
    return bar_chart(values, "milliseconds", None, columns=3)


def bar_chart(
    values: list[dict[str, Any]], axis: str, limit: float | None, *, columns: int = 1
) -> Chart:
    y = {"field": "who", "type": "nominal", "sort": None, "title": None}
    ticks = {"tickCount": 8 // columns}
    x = {"field": "value", "type": "quantitative", "title": axis, "axis": ticks}
    text = "format(datum.value, datum.value < 100 ? '.3~g' : ',.0f')"
    ours = {"test": "datum.who == 'ours'", "value": BLUE}
    cases = list(dict.fromkeys(value["case"] for value in values))
    peers = any(value["who"] == "ours" for value in values)
    colour = {"condition": ours, "value": GREYS[0]} if peers else {"value": BLUE}
    layers: list[Chart] = [
        {"mark": "bar", "encoding": {"y": y, "x": x, "color": colour}},
        {
            "transform": [{"calculate": text, "as": "label"}],
            "mark": {"type": "text", "align": "left", "dx": 3},
            "encoding": {"y": y, "x": x, "text": {"field": "label"}},
        },
    ]
    if limit:
        dashed = {"type": "rule", "strokeDash": [4, 3], "color": "black"}
        layers.append({"mark": dashed, "encoding": {"x": {"datum": limit}}})
    return {
        "data": {"values": values},
        "facet": {"field": "case", "type": "nominal", "sort": cases, "title": None},
        "columns": columns,
        "spec": {"width": 460 / columns, "height": {"step": 17}, "layer": layers},
        "resolve": {"scale": {"x": "shared" if limit else "independent", "y": "independent"}},
    }


def growth(record: Record, axes: dict[str, str], metric: str, axis: str) -> Chart:
    """A line for everyone along each axis; cases are called ``axis-value``."""
    roofs = record.get("roofline", {})
    charts = []
    for name, title in axes.items():
        values = [
            {"at": float(case.removeprefix(name)), "who": who, "value": value}
            for line in record["rows"]
            if (case := line["case"]).startswith(name) and line["metric"] == metric
            for who, value in everyone(line).items()
        ]
        points = sorted({value["at"] for value in values})
        square = record["limits"]["gemm_tflops"]
        values += [
            {"at": at, "who": LIMIT, "value": roofs.get(f"{name}{at:.0f}", square)} for at in points
        ]
        charts.append(line_chart(values, title, axis, points))
    return {"concat": charts, "columns": 2}


def line_chart(values: list[dict[str, Any]], title: str, axis: str, points: list[float]) -> Chart:
    names = list(dict.fromkeys(value["who"] for value in values))
    colours = [BLUE, *GREYS[: len(names) - 2], "black"]
    labels = "datum.value < 1024 ? datum.value : format(datum.value / 1024, '~g') + 'k'"
    scale = {"type": "log", "base": 2, "domain": [points[0], points[-1]], "nice": False}
    ticks = {"values": points, "labelExpr": labels, "grid": False}
    dashes = [[4, 3] if name == LIMIT else [1, 0] for name in names]
    who = {"field": "who", "type": "nominal", "title": None, "legend": {"symbolType": "stroke"}}
    return {
        "data": {"values": values},
        "width": 250,
        "height": 170,
        "mark": {"type": "line", "point": {"size": 22}, "strokeWidth": 1.8},
        "encoding": {
            "x": {
                "field": "at",
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "axis": ticks,
            },
            "y": {"field": "value", "type": "quantitative", "title": axis},
            "color": {**who, "scale": {"domain": names, "range": colours}},
            "strokeDash": {**who, "scale": {"domain": names, "range": dashes}},
        },
    }


TFLOPS = "TFLOP/s, forward and backward"
EXPERTS = {
    "tokens-": "tokens",
    "experts-": "experts",
    "topk-": "experts a token goes to",
    "dim-": "width of the model; an expert's is half",
}
DRAWN: dict[str, tuple[str, Callable[[Record], Chart]]] = {  # file: benchmark, how
    "train-step": (
        "train_step",
        lambda record: bars(record, "tokens_per_second", "tokens a second"),
    ),
    "moe-layer": ("moe_layer", lambda record: bars(record, "fwd_bwd", TFLOPS, limited=True)),
    "moe-layer-passes": ("moe_layer", passes),
    "moe-layer-growth": (
        "moe_layer_scaling",
        lambda record: growth(record, EXPERTS, "fwd_bwd", TFLOPS),
    ),
    "loss": ("loss", lambda record: bars(record, "ms", "milliseconds, forward and backward")),
    "attention": ("attention", lambda record: bars(record, "fwd_bwd", TFLOPS, limited=True)),
    "attention-growth": (
        "attention_scaling",
        lambda record: {
            "hconcat": [
                growth(record, {"t": "tokens a row"}, metric, f"TFLOP/s, {title}")
                for metric, title in (("fwd", "forward"), ("fwd_bwd", "forward and backward"))
            ]
        },
    ),
    "many-gpus": (
        "expert_parallel",
        lambda record: bars(record, "tokens_per_second", "tokens a second of all GPUs"),
    ),
    "router": (
        "router",
        lambda record: bars(record, "router", "milliseconds, forward and backward"),
    ),
    "optimizer": ("optimizer", lambda record: bars(record, "ms", "milliseconds a step")),
}


def save(name: str, chart: Chart) -> None:
    PLOTS.mkdir(exist_ok=True)
    look = {
        "axis": {"titleFontWeight": "normal", "gridColor": "#e8e8e8"},
        "header": {"labelAnchor": "start", "labelFontWeight": "bold", "labelFontSize": 11},
        "view": {"stroke": None},
    }
    schema = "https://vega.github.io/schema/vega-lite/v5.json"
    whole = {"$schema": schema, "background": "white", "config": look, **chart}
    (PLOTS / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(whole))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="h100")
    device = parser.parse_args().device
    for name, (benchmark, draw) in DRAWN.items():
        if record := newest(benchmark, device):
            save(name, draw(record))


if __name__ == "__main__":
    main()
