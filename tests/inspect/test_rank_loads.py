"""Loads by rank of a recorded run: as experts lie, and as EPLB places them."""

import json

import pytest

from fathom.cli import main
from fathom.inspect.ranks import drawn, rank_loads
from fathom.parallel.placement import imbalance


@pytest.fixture
def run(tmp_path):
    """Two MoE layers of four experts, three steps; the first has other loads than the rest."""
    steps = [[[4, 0, 0, 0], [1, 1, 1, 1]], *[[[1.5, 1.5, 0.5, 0.5], [1, 1, 1, 1]]] * 2]
    lines = [
        {"step": at, "layers": [{"load": load} for load in step]} for at, step in enumerate(steps)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_neighbours_share_a_rank_before_and_loads_are_even_after(run):
    first, second = rank_loads(run, 2, last=2)
    assert first.before == [1.5, 0.5]
    assert first.after == [1.0, 1.0]
    assert sorted(first.slots) == [0, 1, 2, 3]
    assert second.before == second.after == [1.0, 1.0]


def test_the_mean_is_of_as_many_steps_as_asked(run):
    (first, _) = rank_loads(run, 2, last=3)
    assert first.before == pytest.approx([5 / 3, 1 / 3])  # 4 + 3 + 3 and 0 + 1 + 1


def test_replicas_share_a_busy_expert(run):
    (first, _) = rank_loads(run, 4, replicas=4, last=2)
    assert imbalance(first.before) == 1.5
    assert imbalance(first.after) == 1.0
    assert len(first.slots) == 8


def test_a_drawing_has_a_bar_for_each_rank():
    assert drawn([0.0, 1.0, 2.0, 5.0]) == "▁▅██  2.50"


def test_a_run_without_loads_is_refused_with_the_way_to_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "layers": [{"max_violation": 1.0}]}\n')
    with pytest.raises(ValueError, match=r"train it with train\.log_load=true"):
        rank_loads(tmp_path, 2)


def test_ranks_that_do_not_divide_the_experts_are_refused(run):
    with pytest.raises(ValueError, match="n_gpus must divide n_slots"):
        rank_loads(run, 3)


def test_the_verb_draws_both_placements_of_every_layer(run, capsys):
    assert main(["inspect", str(run), "--ranks", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("MoE layer 0  as they lie")
    assert lines[2].endswith("1.00")  # the second layer is even as it lies


def test_the_verb_wants_a_text_or_ranks(run, capsys):
    assert main(["inspect", str(run)]) == 2
