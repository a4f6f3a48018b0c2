"""Where labels go, which arms are on the frontier, and what the line charts compare."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.ladder import charts, curves
from fathom.ladder.recorded import Study, read_study

rising = st.lists(st.floats(-1, 1), min_size=1, max_size=30).map(sorted)


@given(rising, st.floats(0.001, 0.05))
def test_labels_stand_apart_in_order_and_inside(wanted, line):
    low, high = min(wanted) - 1, max(wanted) + 1
    places = charts.apart(wanted, low, high, line)
    assert all(b - a >= line - 1e-9 for a, b in pairwise(places))
    assert low - 1e-9 <= places[0]
    assert places[-1] <= high + 1e-9


def test_labels_that_do_not_clash_stay_and_those_that_do_share_their_mean():
    assert charts.apart([0.0, 1.0, 5.0], -9, 9, 1.0) == [0.0, 1.0, 5.0]
    assert charts.apart([0.0, 0.0, 5.0], -9, 9, 1.0) == [-0.5, 0.5, 5.0]
    assert charts.apart([0.0, 0.0], 0, 9, 1.0) == [0.0, 1.0]  # pushed inside


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20))
def test_the_frontier_is_what_no_other_point_beats_on_both_axes(points):
    best = {
        (cost, loss)
        for cost, loss in points
        if not any(
            (c <= cost and other < loss) or (c < cost and other <= loss) for c, other in points
        )
    }
    found = [(row["cost"], row["loss"]) for row in charts.frontier(points)]
    assert found == sorted(best)


def study_of(folder: Path, *arms: dict[str, Any]) -> Study:
    (folder / "results.json").write_text(json.dumps({"margin": 0.01, "arms": arms}))
    return read_study(folder)


def arm(name: str, parent: str | None = None, mean: float = 2.0, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "parent": parent,
        "val_bpb": {"mean": mean, "std": 0.01, "n": 3},
        **fields,
    }


def curve(seed: int, **points: float) -> dict[str, Any]:
    """``t100=3.0`` is 3.0 bits per byte after 100 tokens."""
    return {"seed": seed, "tokens": [int(key[1:]) for key in points], "bpb": list(points.values())}


def test_the_mean_curve_holds_the_points_that_all_seeds_have(tmp_path):
    both = [curve(1, t100=3.0, t200=2.0, t300=1.0), curve(2, t300=2.0, t100=5.0)]
    study = study_of(tmp_path, arm("a", curves=both))
    assert curves.mean_curves(study) == {"a": [(100, 4.0), (300, 1.5)]}


def test_a_gap_compares_the_same_seed_at_the_same_tokens(tmp_path):
    study = study_of(
        tmp_path,
        arm("a", curves=[curve(1, t100=3.0, t200=2.0), curve(2, t100=9.0)]),
        arm("b", "a", curves=[curve(1, t100=3.5, t300=1.0), curve(3, t100=1.0)]),
    )
    spec = curves.gaps(study)
    assert spec is not None
    assert spec["data"]["values"] == [{"arm": "b", "seed": "1", "x": [100], "y": [0.5]}]


def test_a_gap_to_a_parent_that_failed_is_not_drawn(tmp_path):
    found = [curve(1, t100=3.0)]
    study = study_of(tmp_path, arm("a", failed="NaN", curves=found), arm("b", "a", curves=found))
    assert curves.gaps(study) is None


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    tokens = list(range(1, 1001))
    long = {"seed": 1, "tokens": tokens, "bpb": [1 + 1 / t for t in tokens]}
    points = curves.mean_curves(study_of(tmp_path, arm("a", curves=[long])))["a"]
    assert len(points) == 60
    assert [points[0][0], points[-1][0]] == [1, 1000]


def lines(study: Study, points: list[tuple[float, float]], **options: Any) -> charts.Spec:
    spec = curves.lines(study, {"a": points}, "Lines.", x="place", y="loss", **options)
    assert spec is not None
    return spec["layer"][0]["encoding"]


@pytest.mark.parametrize(
    ("places", "kind"),
    [
        ([1, 2, 16], "log"),
        ([1, 2, 15], "linear"),
        ([0, 4, 64], "symlog"),
        ([0, 4, 60], "linear"),
        ([-8, 1, 64], "linear"),
        ([5], "linear"),
    ],
)
def test_an_axis_is_logarithmic_where_it_runs_over_four_doublings(places, kind, tmp_path):
    x = lines(study_of(tmp_path, arm("a")), [(place, 1.0) for place in places])["x"]
    assert x["scale"]["type"] == kind
    assert x["axis"]["values"] == places


def test_a_logarithmic_height_leaves_out_what_has_no_logarithm(tmp_path):
    study = study_of(tmp_path, arm("a"))
    y = lines(study, [(1, 2.0), (2, 0.0), (3, 4.0)], log_y=True)["y"]
    assert y["scale"] == {"type": "log", "domain": [2.0, 4.0], "nice": False}
    assert curves.lines(study, {"a": [(1, 0.0)]}, "Lines.", x="x", y="y", log_y=True) is None


def test_the_best_arm_is_in_front_and_the_first_where_it_has_no_line(tmp_path):
    study = study_of(tmp_path, arm("a"), arm("b", "a", mean=1.0), arm("c", "a", mean=3.0))
    assert curves.front(study, ["a", "b", "c"]) == "b"
    assert curves.front(study, ["c", "a"]) == "c"


def test_an_arm_is_drawn_against_a_cost_it_has(tmp_path):
    study = study_of(
        tmp_path,
        arm("a", flops_per_token=100),
        arm("b", "a", flops_per_token=0),
        arm("c", "a", flops_per_token=None),
        arm("d", "a", mean=1.9, flops_per_token=80, verdict={"verdict": "better"}),
    )
    spec = charts.loss_against(study, "flops_per_token", "FLOPs")
    assert spec is not None
    rows = spec["data"]["values"]
    assert [(row["arm"], row["verdict"]) for row in rows] == [("d", "better"), ("a", "start")]
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert all(low <= row[key] <= high for row in rows for key in ("low", "high", "label"))
    assert spec["layer"][1]["data"]["values"] == [{"cost": 80, "loss": 1.9}]
    assert charts.loss_against(replace(study, arms=study.arms[1:3]), "flops_per_token", "x") is None


def test_every_spec_names_its_colours_and_gives_no_other(tmp_path):
    study = study_of(tmp_path, arm("a", flops_per_token=1, curves=[curve(1, t1=2.0, t2=1.0)]))
    found = [charts.loss_against(study, "flops_per_token", "x"), curves.learning(study)]
    found.append(charts.experts("Map.", {"0": [1.0, 0.5]}, "layer"))
    for spec in found:
        assert spec is not None
        params = {item["name"]: item["value"] for item in spec.pop("params")}
        assert {name: params[name] for name in charts.COLOURS} == {
            name: light for name, (light, _) in charts.COLOURS.items()
        }
        assert "#" not in json.dumps(spec)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(over: str, under: str, share: float) -> str:
    pairs = [(int(over[i : i + 2], 16), int(under[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for a, b in pairs)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa_in_both_themes(theme):
    colours = {name: pair[theme] for name, pair in charts.COLOURS.items()}
    for text in ("ink", "muted", "accent", "worse"):
        assert contrast(colours[text], colours["page"]) >= 4.5
    assert contrast(colours["faint"], colours["page"]) >= 3  # marks and the borders of controls
    for tint in ("accent", "worse"):  # a fully shaded cell of the domain table
        assert contrast(colours["ink"], mixed(colours[tint], colours["page"], 0.34)) >= 4.5
    assert contrast(colours["ink"], colours["panel"]) >= 4.5
