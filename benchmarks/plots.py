"""Draw the plots of ``docs/performance.md`` from the newest records of one GPU.

python benchmarks/plots.py [--device h100]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import vl_convert

HERE = Path(__file__).parent
PLOTS = HERE.parent / "docs" / "performance"
METRICS = {  # benchmark, metric: file, axis
    ("moe_layer", "fwd_bwd"): ("moe-layer", "TFLOP/s, forward and backward"),
    ("loss", "ms"): ("loss", "milliseconds, forward and backward"),
    ("train_step", "tokens_per_second"): ("train-step", "tokens a second"),
}


def newest(benchmark: str, device: str) -> dict[str, Any] | None:
    files = sorted((HERE / "results").glob(f"{benchmark}-{device}-*.json"))
    return json.loads(files[-1].read_text()) if files else None


def bars(record: dict[str, Any], metric: str, axis: str) -> dict[str, Any]:
    """A group of bars a case: ours first, then the peers."""
    values = [
        {"case": line["case"], "who": who, "value": value}
        for line in record["rows"]
        if line["metric"] == metric
        for who, value in {"ours": line["ours"], **line["peers"]}.items()
    ]
    return chart(values, axis, colour="who", label="case")


def passes(record: dict[str, Any]) -> dict[str, Any]:
    """What every pass of the expert layer takes."""
    values = [
        {"case": case, "who": name, "value": value}
        for case, parts in record["passes"].items()
        for name, value in parts.items()
    ]
    return chart(values, "milliseconds", colour=None, label="case")


def chart(
    values: list[dict[str, Any]], axis: str, *, colour: str | None, label: str
) -> dict[str, Any]:
    bar: dict[str, Any] = {
        "mark": "bar",
        "encoding": {
            "y": {
                "field": "who",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"labelLimit": 400},
            },
            "x": {"field": "value", "type": "quantitative", "title": axis},
        },
    }
    text = {
        "mark": {"type": "text", "align": "left", "dx": 3},
        "encoding": {**bar["encoding"], "text": {"field": "label"}},
    }
    short = "format(datum.value, datum.value < 100 ? '.3~g' : ',.0f')"
    if colour:
        condition = {"test": "datum.who == 'ours'", "value": "#0a5fb4"}
        bar["encoding"]["color"] = {"condition": condition, "value": "#9ba7b0"}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "data": {"values": values},
        "transform": [{"calculate": short, "as": "label"}],
        "facet": {"row": {"field": label, "type": "nominal", "sort": None, "title": None}},
        "spec": {"width": 460, "layer": [bar, text]},
        "resolve": {"scale": {"x": "independent", "y": "independent"}},
    }


def save(name: str, spec: dict[str, Any]) -> None:
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="h100")
    device = parser.parse_args().device
    for (benchmark, metric), (name, axis) in METRICS.items():
        if (record := newest(benchmark, device)) and record["rows"]:
            save(name, bars(record, metric, axis))
    record = newest("moe_layer", device)
    if record and record.get("passes"):
        save("moe-layer-passes", passes(record))


if __name__ == "__main__":
    main()
