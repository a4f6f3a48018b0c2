"""A probe's record is read whatever its shape: lines become lines, numbers become columns."""

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.ladder.readings import figures_in, lines_in, readings, routings
from fathom.ladder.recorded import Study, read_study
from fathom.ladder.tables import NONE, figure_table, si

POINTS = [(1, 0.5), (2, 0.4), (4, 0.3)]


@pytest.mark.parametrize(
    "record",
    [
        {"place": [1, 2, 4], "loss": [0.5, 0.4, 0.3]},
        {"loss": [0.5, 0.4, 0.3], "place": [1, 2, 4]},
        [{"place": 1, "loss": 0.5}, {"place": 2, "loss": 0.4}, {"place": 4, "loss": 0.3}],
        {"place": [1, 2, 4], "loss": [0.5, 0.4, 0.3], "note": ["x", "y", "z"], "n": 3},
    ],
    ids=["lists", "axis-last", "records", "with-others"],
)
def test_lists_beside_rising_whole_numbers_are_a_line(record):
    assert lines_in(record) == {"loss": ("place", POINTS)}


def test_numbers_under_whole_numbers_are_a_line_in_numeric_order():
    assert lines_in({"10": 3.0, "2": 2.0, "1": 1.0}) == {
        "value": ("at", [(1, 1.0), (2, 2.0), (10, 3.0)])
    }


def test_lines_are_found_at_any_depth_and_named_by_their_path():
    nested = {"mla": {"expanded": {"length": [1, 2, 3], "tokens_per_second": [9.0, 8.0, 7.0]}}}
    assert list(lines_in(nested)) == ["mla expanded tokens per second"]
    assert figures_in(nested) == {}


def test_a_hole_in_a_line_is_skipped():
    record = {"x": [1, 2, 3], "y": [1.0, None, 3.0]}
    assert lines_in(record)["y"] == ("x", [(1, 1.0), (3, 3.0)])


@pytest.mark.parametrize(
    "record",
    [
        {"x": [1, 2], "y": [1.0, 2.0]},
        {"x": [1, 2, 2], "y": [0.1, 0.3, 0.2]},
        {"x": [1, 2, 3], "y": [0.1, 0.2]},
        {"x": [0.5, 1.5, 2.5], "y": [0.1, 0.2, 0.3]},
        [1, 2, 3],
        "text",
        None,
    ],
    ids=repr,
)
def test_what_is_no_line_is_none(record):
    assert lines_in(record) == {}


def test_figures_are_named_by_their_path_and_lists_are_shortened():
    record = {
        "speed": {"expanded": 1.5, "kind": "mla"},
        "dead": True,
        "few": [1.0, 0.25],
        "many": [5, 1, 4, 2, 3],
        "matrix": [[1, 2], [3, 4]],
        "none": None,
        "holes": [1, None],
    }
    assert figures_in(record) == {
        "speed expanded": 1.5,
        "speed kind": "mla",
        "dead": "True",
        "few": "1, 0.25",
        "many": "1 to 5 (5 values)",
    }
    assert figures_in(0.5) == {"value": 0.5}


def test_a_column_has_one_format_and_says_where_it_has_nothing():
    figures = {
        "a": {"rate": 512.53, "cache_bytes": 2048, "count": 3, "share": 0.0312},
        "b": {"rate": 9.0, "count": None, "share": "n/a"},
    }
    named = {
        arm: {key.replace("_", " "): v for key, v in row.items()} for arm, row in figures.items()
    }
    table = figure_table("Caption", named)
    assert table is not None
    assert table.head == ["arm", "rate", "cache bytes", "count", "share"]
    texts = {arm: [cell.text for cell in cells] for arm, cells in table.rows}
    assert texts["a"] == ["512.5", "2.05 kB", "3", "0.03120"]
    assert texts["b"] == ["9.0", NONE, NONE, "n/a"]
    assert figure_table("Caption", {"a": {}}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (999.6, "1 k"), (1234, "1.23 k"), (3.12e6, "3.12 M"), (0.25, "0.25"),
     (999_999, "1 M"), (2.5e18, "2.5e+03 P"), (None, NONE), (-1500, "-1.5 k")],
)  # fmt: skip
def test_large_numbers_are_three_digits_and_a_letter(value, text):
    assert si(value) == text


def study_of(folder: Path, **probes: dict[str, Any]) -> Study:
    arms = [
        {"name": name, "val_bpb": {"mean": 2.0}, "probes": found} for name, found in probes.items()
    ]
    (folder / "results.json").write_text(json.dumps({"arms": arms}))
    return read_study(folder)


def test_known_probes_come_first_and_those_with_a_section_are_left_to_it(tmp_path):
    found = {"mine": {"n": 1}, "speed": {"n": 1}, "position": {"n": 1}, "domains": {"n": 1}}
    titles = [
        reading.title for reading in readings(study_of(tmp_path, a=found, b={"routing": {"n": 1}}))
    ]
    assert titles == ["Loss by place in the context", "Decoding: speed and cache", "Mine"]


def test_what_chance_gives_is_one_more_line_in_the_other_charts(tmp_path):
    record = {"pairs": [2, 4, 8], "accuracy": [0.9, 0.8, 0.7], "chance": [0.5, 0.25, 0.125]}
    (reading,) = readings(study_of(tmp_path, a={"retrieval": record}, b={"retrieval": record}))
    assert list(reading.lines) == ["accuracy"]
    axis, arms = reading.lines["accuracy"]
    assert axis == "pairs"
    assert list(arms) == ["a", "b", "chance"]
    assert arms["chance"] == [(2, 0.5), (4, 0.25), (8, 0.125)]


def test_expert_loads_are_ratios_to_the_fair_share_counts_or_shares(tmp_path):
    counts = {"load": [[30, 10], [0, 0]], "max_violation": 0.5}
    (counted, shared) = routings(
        study_of(tmp_path, a={"routing": counts}, b={"routing": {"load": [[0.75, 0.25]]}}, c={})
    )
    assert counted.load == shared.load == [[1.5, 0.5]]
    assert counted.figures == {"max violation": 0.5}
    assert counted.divergence is None


def test_domains_are_shown_in_the_layer_where_they_differ_most(tmp_path):
    record = {"prose": [[0.5, 0.5], [0.9, 0.1]], "code": [[0.6, 0.4], [0.2, 0.8]], "odd": "?"}
    (routing,) = routings(study_of(tmp_path, a={"routing": {"by_domain": record}}))
    assert routing.layer == 1
    assert routing.by_domain["prose"] == pytest.approx([1.8, 0.2])
    assert list(routing.by_domain) == ["prose", "code"]
