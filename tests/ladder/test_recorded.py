"""results.json is read tolerantly: what is missing or impossible is None, never an error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fathom.ladder.recorded import Study, interval, number, read_study, text


@pytest.mark.parametrize(
    ("value", "want"),
    [(1, 1.0), (0.5, 0.5), (True, None), (math.nan, None), (math.inf, None), ("1", None),
     (None, None), (10**400, None), ([1], None)],
)  # fmt: skip
def test_a_number_is_finite_or_none(value, want):
    assert number(value) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ([1, 2], (1, 2)),
        ([2, 1], (1, 2)),
        ([1], None),
        ([1, None], None),
        (None, None),
        ("ab", None),
    ],
)
def test_an_interval_has_two_ends_in_order(value, want):
    assert interval(value) == want


@pytest.mark.parametrize(("value", "want"), [("a", "a"), (3, "3"), ("", "-"), (math.nan, "-")])
def test_text_is_whatever_is_not_missing(value, want):
    assert text(value, "-") == want


def study(folder: Path, *arms: dict[str, Any], **fields: Any) -> Study:
    (folder / "results.json").write_text(json.dumps({**fields, "arms": list(arms)}))
    return read_study(folder)


def test_differences_are_read_with_their_marks_or_as_bare_keys(tmp_path):
    full = {"key": "k", "parent": None, "arm": [1, "x"], "mark": "extra"}
    older = {"key": "k", "parent": "y", "arm": True, "why": "fit"}
    found = study(
        tmp_path,
        {"name": "a", "differs": ["k"], "differences": [full]},
        {"name": "b", "differs": [older]},
        {"name": "c", "differs": ["k"]},
    ).arms
    (first,), (second,), (third,) = (arm.differs for arm in found)
    assert (first.parent, first.arm, first.mark) == ("absent", '[1, "x"]', "extra")
    assert (second.parent, second.arm, second.mark) == ("y", "true", "fit")
    assert (third.key, third.mark) == ("k", "")
    assert [arm.extras for arm in found] == [1, 0, 0]


def test_curves_are_sorted_and_lose_what_is_no_point(tmp_path):
    points = {"seed": 1, "tokens": [300, 100, None, 200], "bpb": [1.0, 3.0, 2.0, math.nan]}
    (arm,) = study(tmp_path, {"name": "a", "curves": [points, {"tokens": []}, 7]}).arms
    (curve,) = arm.curves
    assert (curve.tokens, curve.bpb) == ((100, 300), (3.0, 1.0))


def test_a_sweep_keeps_its_points_and_loses_the_rest(tmp_path):
    swept = {"a": {"points": [[0.001, 2.5], [0.01, None], 7, [0.1]], "note": "n"}, "b": {}, "c": 1}
    found = study(tmp_path, {"name": "a"}, lr={"chosen": "swept", "sweep": swept})
    assert found.sweep == {"a": ((0.001, 2.5),)}


def test_an_unknown_verdict_is_unsure(tmp_path):
    found = study(tmp_path, {"name": "a", "verdict": {"verdict": "great", "delta_bpb": -1}}).arms
    assert found[0].verdict is not None
    assert (found[0].verdict.word, found[0].verdict.delta) == ("unsure", -1)


def test_the_best_arm_is_the_lowest_that_finished(tmp_path):
    means = {"a": 2.0, "b": 1.5, "c": 1.0, "d": None}
    arms = [{"name": name, "val_bpb": {"mean": mean}} for name, mean in means.items()]
    arms[2]["failed"] = "NaN"
    found = study(tmp_path, *arms)
    assert found.best is not None
    assert found.best.name == "b"
    assert [arm.name for arm in found.finished] == ["a", "b"]


def test_the_budget_is_a_sentence_even_where_none_was_recorded(tmp_path):
    found = study(tmp_path, {"name": "a"}, study="s", budget={"hold": "tokens", "value": 400000})
    assert found.budget == "tokens = 400,000"
    assert found.title == "s"
