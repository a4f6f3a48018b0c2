"""``results.json`` has every name that scripts rely on, whatever order the runs ended in."""

import json
import math
from statistics import fmean, stdev

import pytest

from fathom.ladder.plan import arm_differences, plan
from fathom.ladder.results import ArmOutcome, assemble, evaluation_interval, learned

ARM_KEYS = {
    *("name", "parent", "claim", "differs", "seeds", "val_bpb", "params", "active_params"),
    *("flops_per_token", "cache_bytes_per_token", "train_tokens_per_second", "peak_memory_bytes"),
    *("probes", "verdict", "failed"),
}
VERDICT_KEYS = {"verdict", "delta_bpb", "interval", "sentence"}
ABOUT = {
    "data": {"source": "x"},
    "env": {},
    "lr": {},
    "lr_note": "",
    "commands": [],
    "anchors": {"order2": {"mean": 3.0, "by_domain": {"prose": 3.0}}},
}


def run(seed: int, bpb: float) -> dict:
    """A run's result.json; two documents of 8 bytes a domain, one easier than the other."""
    nats = [8 * math.log(2) * (bpb - 0.1), 8 * math.log(2) * (bpb + 0.1)]
    document = {"nats": nats, "units": [8, 8]}
    return {
        "seed": seed,
        "lr": 0.1,
        "val_bpb": bpb,
        "by_domain": {"prose": bpb, "code": bpb},
        "symbols": {"image": 2 * bpb},
        "documents": {"prose": document, "code": document},
        "tokens": 512,
        "train_seconds": 1.0,
        "curve": {"tokens": [512], "bpb": [bpb]},
    }


def outcome(*losses: float, seeds=(1, 2, 3), **more) -> ArmOutcome:
    runs = {seed: run(seed, loss) for seed, loss in zip(seeds, losses, strict=True)}
    return ArmOutcome(lr=0.1, runs=runs, **more)


@pytest.fixture
def results(make_study):
    """``results(mha=..., mqa=..., moe=...)``: assembled from these outcomes."""
    study = make_study()
    planned = plan(study)
    differing = arm_differences(planned, {"mha": 0.1, "mqa": 0.1, "moe": 0.1}, tuned=False)

    def make(**outcomes: ArmOutcome) -> dict:
        found = assemble(study, planned, outcomes, differing, about=ABOUT)
        json.dumps(found, allow_nan=False)
        return found

    return make


GOOD = {
    "mha": outcome(2.0, 2.1, 2.2),
    "mqa": outcome(2.5, 2.61, 2.7),
    "moe": outcome(1.9, 2.2, 2.0),
}


def arms(found: dict) -> dict[str, dict]:
    return {arm["name"]: arm for arm in found["arms"]}


def test_every_arm_has_every_key_and_the_root_has_no_parent_and_no_verdict(results):
    found = results(**GOOD)
    assert {"study", "budget", "data", "env", "arms"} <= found.keys()
    assert found["budget"]["hold"] == "tokens"
    assert found["budget"]["value"] == 512
    for arm in found["arms"]:
        assert arm.keys() >= ARM_KEYS
    root = arms(found)["mha"]
    assert (root["parent"], root["verdict"], root["differs"]) == (None, None, [])
    assert arms(found)["mqa"]["verdict"].keys() >= VERDICT_KEYS


def test_what_differs_is_listed_by_key_and_told_in_full(results):
    mqa = arms(results(**GOOD))["mqa"]
    assert mqa["differs"] == ["model.groups.*.attention.n_kv_heads", "model.groups.*.ffn.inter_dim"]
    assert [d["mark"] for d in mqa["differences"]] == ["named", "fit"]


def test_an_arms_score_is_the_mean_and_spread_of_its_seeds(results):
    score = arms(results(**GOOD))["mqa"]["val_bpb"]
    assert score["mean"] == pytest.approx(fmean([2.5, 2.61, 2.7]))
    assert score["std"] == pytest.approx(stdev([2.5, 2.61, 2.7]))
    assert score["n"] == 3
    assert score["by_domain"].keys() == {"prose", "code"}
    assert arms(results(**GOOD))["mqa"]["symbols"]["image"] == pytest.approx(2 * score["mean"])


def test_seeds_are_paired_by_number_not_by_order(results):
    backwards = outcome(2.7, 2.61, 2.5, seeds=(3, 2, 1))
    assert results(**GOOD) == results(**{**GOOD, "mqa": backwards})
    assert arms(results(**GOOD))["mqa"]["verdict"]["verdict"] == "worse"


def test_only_seeds_that_both_have_are_judged(results):
    fewer = outcome(2.5, 2.7, seeds=(1, 3))
    verdict = arms(results(**{**GOOD, "mqa": fewer}))["mqa"]["verdict"]
    assert verdict["n"] == 2
    assert verdict["verdict"] == "unsure"
    assert verdict["delta_bpb"] == pytest.approx(0.5)


def test_a_failed_seed_makes_its_arm_a_row_that_says_so(results):
    half = outcome(2.5, 2.6, seeds=(1, 2), failures={3: "not finite"})
    found = arms(results(**{**GOOD, "mqa": half}))
    assert found["mqa"]["failed"] == "seed 3: not finite"
    assert found["mqa"]["val_bpb"] == {"mean": None, "std": None, "n": 0, "by_domain": None}
    assert found["mqa"]["verdict"] is None
    assert found["mqa"].keys() == found["moe"].keys()
    assert found["moe"]["verdict"]["n"] == 3  # the others are judged as before


def test_equal_reasons_of_failed_seeds_are_told_once(results):
    dead = ArmOutcome(lr=None, failures={3: "killed", 1: "killed", 2: "not finite"})
    assert arms(results(**{**GOOD, "moe": dead}))["moe"]["failed"] == (
        "seed 1, 3: killed; seed 2: not finite"
    )


def test_children_of_a_failed_parent_are_unsure_and_say_why(results):
    dead = ArmOutcome(lr=None, failures={1: "killed"})
    verdict = arms(results(**{**GOOD, "mha": dead}))["mqa"]["verdict"]
    assert verdict["verdict"] == "unsure"
    assert "mha, its parent, has no result" in verdict["sentence"]


def test_the_evaluations_own_interval_holds_the_loss_and_ignores_equal_documents():
    runs, parents = [run(1, 2.0), run(2, 2.2)], [run(1, 1.9), run(2, 2.1)]
    low, high = evaluation_interval(runs)
    assert low < 2.1 < high
    assert high - low > 0.05
    assert evaluation_interval(runs, parents) == pytest.approx((0.1, 0.1))
    assert evaluation_interval([]) is None


@pytest.mark.parametrize(("best", "below"), [(2.0, True), (3.0, False), (3.5, False)])
def test_learning_is_told_against_the_order_2_model(best, below):
    rows = [
        {"name": "a", "val_bpb": {"mean": 4.0}},
        {"name": "b", "val_bpb": {"mean": best}},
        {"name": "dead", "val_bpb": {"mean": None}},
    ]
    found = learned(rows, ABOUT["anchors"])
    assert (found["best_arm"], found["below"], found["order2"]) == ("b", below, 3.0)
    assert f"{best:.3f}" in found["sentence"]
    assert "3.000" in found["sentence"]


def test_nothing_is_said_of_learning_when_no_arm_finished():
    found = learned([{"name": "a", "val_bpb": {"mean": None}}], ABOUT["anchors"])
    assert found["below"] is None
    assert found["sentence"].startswith("No arm finished")


def test_a_study_says_what_difference_it_could_have_seen(results):
    noisy = outcome(2.0, 2.1, 2.2), outcome(2.05, 2.02, 2.31), outcome(1.9, 2.2, 2.0)
    quiet = outcome(2.0, 2.1, 2.2), outcome(2.005, 2.102, 2.211), outcome(1.99, 2.11, 2.18)
    deltas = []
    for mha, mqa, moe in (noisy, quiet):
        found = results(mha=mha, mqa=mqa, moe=moe)["detectable"]
        assert f"{found['delta_bpb']:.3f} bits per byte" in found["sentence"]
        deltas.append(found["delta_bpb"])
    assert deltas[0] > 5 * deltas[1]


def test_two_seeds_could_have_seen_nothing(results):
    two = {name: outcome(2.0, 2.1, seeds=(1, 2)) for name in ("mha", "mqa", "moe")}
    assert results(**two)["detectable"] == {"delta_bpb": None, "sentence": ""}
