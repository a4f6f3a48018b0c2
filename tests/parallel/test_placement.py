"""Placement of experts: EPLB's own example, and what must hold for any load."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fathom.parallel.placement import gpu_loads, imbalance, pack, place, replicate

GOLDEN = [  # of the example in EPLB's README: loads of 12 experts, the experts of 16 slots
    (
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        1.208,
    ),
    (
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        1.242,
    ),
]


@pytest.mark.parametrize(("load", "slots", "worst"), GOLDEN, ids=["layer-0", "layer-1"])
def test_the_published_example_comes_out_slot_by_slot(load, slots, worst):
    assert place(load, n_slots=16, n_gpus=8, n_nodes=2, n_groups=4) == slots
    assert imbalance(gpu_loads(load, slots, 8)) == pytest.approx(worst, abs=5e-4)


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8), st.sampled_from([1, 2, 3]))
def test_every_expert_has_a_slot_and_no_load_is_lost(load, groups_of):
    n_groups = {1: 1, 2: 4, 3: 8}[groups_of]
    slots = place(load, n_slots=12, n_gpus=4, n_nodes=2, n_groups=n_groups)
    assert set(slots) == set(range(8))
    assert sum(gpu_loads(load, slots, 4)) == pytest.approx(sum(load))


def test_groups_stay_within_a_node():
    slots = place([9, 1, 8, 2, 7, 3, 6, 4], n_slots=8, n_gpus=4, n_nodes=2, n_groups=4)
    nodes = [{expert // 2 for expert in slots[half : half + 4]} for half in (0, 4)]
    assert not nodes[0] & nodes[1]


def test_replicas_go_where_a_replica_has_most_to_do():
    assert replicate([10.0, 1.0, 6.0], 5) == ([0, 1, 2, 0, 2], [5.0, 1.0, 3.0, 5.0, 3.0])


def test_packs_are_of_equal_number():
    assert pack([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"n_slots": 3, "n_gpus": 1}, "n_slots must be at least the 4 experts"),
        ({"n_slots": 6, "n_gpus": 4}, r"n_gpus must divide n_slots \(6\), got 4"),
        ({"n_slots": 4, "n_gpus": 4, "n_nodes": 3}, r"n_nodes must divide n_gpus \(4\), got 3"),
        ({"n_slots": 4, "n_gpus": 2, "n_groups": 3}, r"n_groups must divide the experts \(4\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        place([1, 2, 3, 4], **sizes)
