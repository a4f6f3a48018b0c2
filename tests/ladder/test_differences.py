"""Every difference between two configs is found, named once, and accounted for or flagged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.ladder.differences import differences
from fathom.settings import override

ATTENTION = {
    "kind": "mha",
    "n_heads": 4,
    "n_kv_heads": 4,
    "position": {"kind": "rope", "theta": 1.0},
}
DENSE = {"kind": "dense", "inter_dim": 64}


def config(*counts: int) -> dict:
    """A run config whose groups have these many layers, all alike."""
    groups = [{"count": count, "attention": ATTENTION, "ffn": DENSE} for count in counts]
    return {"model": {"dim": 32, "groups": groups}, "train": {"lr": 0.1, "betas": [0.9, 0.95]}}


def found(parent: dict, arm: dict, **more) -> list[tuple]:
    return [(d.key, d.parent, d.arm, d.mark) for d in differences(parent, arm, **more)]


def test_equal_configs_do_not_differ():
    assert found(config(4), config(4)) == []


@pytest.mark.parametrize("cut", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_how_equal_layers_are_grouped_is_no_difference(cut):
    assert found(config(4), config(*cut)) == []


def test_a_change_in_all_layers_is_told_once_under_the_name_an_override_gives_it():
    change = ["model.groups.*.attention.n_kv_heads=1"]
    arm = override(config(1, 3), change)
    assert found(config(1, 3), arm, change=change) == [
        ("model.groups.*.attention.n_kv_heads", 4, 1, "named")
    ]


def test_a_change_in_some_layers_says_which():
    arm = override(
        config(2, 1, 3), ["model.groups.0.ffn.inter_dim=8", "model.groups.2.ffn.inter_dim=8"]
    )
    assert found(config(6), arm) == [("model.layers.0-1,3-5.ffn.inter_dim", 64, 8, "extra")]


@pytest.mark.parametrize(
    ("change", "mark"), [("model.groups.*.count=3", "named"), ("x=1", "extra")]
)
def test_a_deeper_arm_differs_in_how_many_layers_it_has(change, mark):
    assert found(config(2), config(3), change=[change]) == [("model.groups.*.count", 2, 3, mark)]


def test_another_kind_shows_the_keys_of_both():
    change = ['model.groups.*.ffn={kind = "moe", top_k = 2}']
    assert found(config(2), override(config(2), change), change=change) == [
        ("model.groups.*.ffn.inter_dim", 64, None, "named"),
        ("model.groups.*.ffn.kind", "dense", "moe", "named"),
        ("model.groups.*.ffn.top_k", None, 2, "named"),
    ]


def test_each_difference_is_accounted_for_or_flagged():
    assignments = [
        "model.groups.0.attention.n_kv_heads=2",
        "model.groups.0.ffn.inter_dim=72",
        "train.lr=0.2",
        "model.dim=48",
        "train.betas=[0.8, 0.95]",
    ]
    marks = found(
        config(2),
        override(config(2), assignments),
        change=["--model.groups.*.attention.n_kv_heads=2"],
        fitted=["model.groups.0.ffn.inter_dim"],
        tuned=["train.lr"],
    )
    assert {key: mark for key, _, _, mark in marks} == {
        "model.groups.*.attention.n_kv_heads": "named",
        "model.groups.*.ffn.inter_dim": "fit",
        "train.lr": "tuned",
        "model.dim": "extra",
        "train.betas": "extra",
    }


def test_a_change_names_its_own_groups_only():
    arm = override(config(1, 1), ["model.groups.*.ffn.inter_dim=8"])
    marks = found(config(1, 1), arm, change=["model.groups.1.ffn.inter_dim=8"])
    assert marks == [
        ("model.layers.0.ffn.inter_dim", 64, 8, "extra"),
        ("model.layers.1.ffn.inter_dim", 64, 8, "named"),
    ]


def test_a_longer_key_is_not_covered_by_the_beginning_of_its_name():
    arm = override(config(2), ["train.lr_scale=2"])
    assert found(config(2), arm, change=["train.lr=0.1"]) == [("train.lr_scale", None, 2, "extra")]


def test_true_is_not_one():
    parent, arm = {"model": {"flag": 1}}, {"model": {"flag": True}}
    assert found(parent, arm) == [("model.flag", 1, True, "extra")]


def test_a_list_of_tables_is_compared_item_by_item():
    one = {"balance": [{"kind": "aux_loss", "coeff": 0.1}]}
    two = {"balance": [{"kind": "aux_loss", "coeff": 0.2}, {"kind": "z_loss"}]}
    assert found(one, two) == [
        ("balance.0.coeff", 0.1, 0.2, "extra"),
        ("balance.1.kind", None, "z_loss", "extra"),
    ]


NAMES = st.sampled_from(["lr", "betas", "dim", "flag"])
TABLES = st.dictionaries(
    NAMES, st.one_of(st.integers(0, 2), st.booleans(), st.lists(st.integers(0, 1)))
)


@given(parent=TABLES, arm=TABLES)
def test_differences_are_exactly_the_keys_with_unequal_values_both_ways(parent, arm):
    forth = {d.key: (d.parent, d.arm) for d in differences({"train": parent}, {"train": arm})}
    back = {d.key: (d.arm, d.parent) for d in differences({"train": arm}, {"train": parent})}
    assert forth == back
    for key in parent.keys() | arm.keys():
        same = repr(parent.get(key)) == repr(arm.get(key))
        assert (f"train.{key}" in forth) == (not same)
