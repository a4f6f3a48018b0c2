"""A study is checked whole before anything is trained, and says what is wrong with which arm."""

import pytest

from fathom.ladder.plan import arm_differences, plan
from fathom.ladder.study import HELD, Budget, Study, list_studies, load_study
from fathom.settings import ConfigError, parse, read_toml, to_data, to_toml

BUILT_IN = [name for name, _ in list_studies()]
UNSWEPT = ("demo", "demo-gpu", "facts", "sparse", "sparse-gpu")
CLAIMS = [name for name in BUILT_IN if name not in UNSWEPT]


def test_the_built_in_studies_are_listed_with_a_title():
    found = dict(list_studies())
    assert {"demo", "demo-gpu"} <= found.keys()
    assert all(found.values())


def test_the_demo_has_the_arms_that_the_question_names():
    names = {arm.name for arm in load_study("demo").arms}
    assert len(names) >= 10
    for wanted in ("gqa", "mqa", "shared-query", "mla", "no-position", "alibi", "dense-wide"):
        assert wanted in names
    for part in ("moe-coarse", "moe-fine", "moe-aux", "moe-loss-free", "mtp"):
        assert any(part in name for name in names)


def test_the_gpu_study_has_the_arms_of_the_demo():
    assert [a.name for a in load_study("demo-gpu").arms] == [
        a.name for a in load_study("demo").arms
    ]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_arm_differs_from_its_parent_in_its_named_change_alone(name):
    study = load_study(name, ["data.source=bundled"])
    planned = plan(study)
    found = arm_differences(planned, {p.arm.name: 0.01 for p in planned}, tuned=True)
    for p in planned[1:]:
        marks = {difference.mark for difference in found[p.arm.name]}
        assert "named" in marks, p.arm.name
        assert marks <= {"named", "fit"}, p.arm.name


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_study_has_three_seeds_and_an_equal_budget_for_every_arm(name):
    study = load_study(name, ["data.source=bundled"])
    assert len(study.seeds) >= 3
    planned = plan(study)
    if study.budget.hold != "active_flops":
        assert len({p.tokens for p in planned}) == 1
        return
    for p in planned:
        step = p.train_flops / p.config.train.steps
        assert study.budget.value - step < p.train_flops <= study.budget.value


@pytest.mark.parametrize("name", CLAIMS)
def test_a_study_of_a_claim_sweeps_the_rate_of_every_arm_around_the_best_of_the_first(name):
    lr = load_study(name).lr
    assert len(lr.sweep) >= 5
    assert min(lr.sweep) <= 0.003 < 0.012 <= max(lr.sweep)  # benchmarks/results/demo_gpu_lr_sweep
    assert lr.sweep_share == 0.25
    assert lr.sweep == tuple(sorted(lr.sweep))


@pytest.mark.parametrize(("latent", "heads"), [("mla-gqa-cache", "gqa"), ("mla-mqa-cache", "mqa")])
def test_at_equal_cache_means_equal_cache_and_equal_parameters(latent, heads):
    planned = {p.arm.name: p for p in plan(load_study("share-kv", ["data.source=bundled"]))}
    assert planned[latent].cache_bytes_per_token == planned[heads].cache_bytes_per_token
    params = [p.params for p in planned.values()]
    assert max(params) < 1.01 * min(params)


def test_experts_have_the_active_parameters_of_one_dense_model_and_all_those_of_another():
    planned = {p.arm.name: p for p in plan(load_study("experts", ["data.source=bundled"]))}
    for name in ("moe-coarse", "moe-fine", "moe-shared"):
        router = 8 * 384 * 32  # the most a layer's router has, in eight layers
        assert 0 <= planned[name].active_params - planned["dense"].params <= router
        assert abs(planned[name].params - planned["dense-wide"].params) <= router


def test_the_demos_rates_come_from_a_recorded_sweep():
    lr = load_study("demo").lr
    assert lr.rates
    assert "sweep" in lr.source


def test_overrides_change_a_study_as_they_change_a_run():
    study = load_study("demo", ["budget.value=4096", "seeds=[7]", "arms.1.claim=Is it?"])
    assert study.budget.value == 4096
    assert study.seeds == (7,)
    assert study.arms[1].claim == "Is it?"


def test_a_study_is_loaded_from_a_path_and_survives_being_written(make_study, tmp_path):
    study = make_study()
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(study))
    assert load_study(path) == study
    assert parse(Study, read_toml(path)) == parse(Study, to_data(study))


def test_an_unknown_study_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"no study 'domo'.*demo"):
        load_study("domo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("budgett.value=1", "unknown key budgett: did you mean budget"),
        ("budget.hold=time", "budget.hold cannot be 'time'"),
        ("budget.value=0", "value must be above 0"),
        ("budget.tolerance=1.5", "tolerance is a share"),
        ("margin=0", "margin must be above 0"),
        ("seeds=[1, 1]", "seeds must be different"),
        ("seeds=[]", "seeds must be different"),
        ("seeds=[-1]", "seeds must be different"),
        ("arms=[]", "at least one arm"),
        ("train.steps=5", "train.steps cannot be set in a study: budget.value"),
        ("train.seed=5", "train.seed cannot be set in a study: seeds"),
        ("arms.1.parent=none", "mqa needs a parent"),
        ("arms.1.parent=moe", "arm mqa: parent must be an earlier arm .one of mha., got 'moe'"),
        ("arms.0.parent=mqa", "claim of mha must be a question"),
        ("arms.1.claim=Yes.", "claim of mqa must be a question"),
        ("arms.1.change=[]", "change of mqa is empty"),
        ("arms.1.name=mha", "two arms are called mha"),
        ("arms.1.name=../up", "name must be lower-case letters"),
        ("arms.1.fit=flops", "arms.1.fit cannot be 'flops'"),
        ("lr.sweep=[0.1, 0.2, 0.3, 0.4, 0.4]", "at least 5 different rates.*got 4"),
        ("lr.sweep=[0, 1, 2, 3, 4]", "above 0"),
        ("lr.sweep_share=1.5", "sweep_share is a share of a run's steps, got 1.5"),
        ("lr.rates={mha = 0.1}", "rates need a source"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(make_study, change, message):
    with pytest.raises(ConfigError, match=message):
        make_study(change)


def test_recorded_rates_must_name_every_arm_and_no_other(make_study):
    source = 'lr.source="an earlier sweep"'
    with pytest.raises(ConfigError, match=r"lr\.rates must give every arm.*mla, moe, mqa"):
        make_study(source, "lr.rates={mha = 0.1, mla = 0.1}")
    with pytest.raises(ConfigError, match="sweep or rates, not both"):
        make_study(source, "lr.rates={mha = 0.1}", "lr.sweep=[1, 2, 3, 4, 5]")


@pytest.mark.parametrize("hold", HELD)
def test_every_budget_is_told_in_a_sentence_with_its_value(hold):
    sentence = Budget(hold=hold, value=12_000, tolerance=0.02).sentence
    assert "12,000" in sentence or "1.2e+04" in sentence
    assert sentence.endswith(".")
