"""Reading configs: unknown keys, wrong types, bounds, kinds, overrides, round trips."""

import random
import string
import tomllib

import pytest

from fathom.config import LayerGroup, ModelConfig, MTPConfig, ParallelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.ffn.balance import AuxLossFree, SeqAuxLoss
from fathom.settings import (
    ConfigError,
    json_schema,
    keys,
    merge,
    override,
    parse,
    read_toml,
    to_data,
    to_toml,
)
from kinds import mha, mla

MOE = MoEConfig(
    n_routed_experts=8,
    top_k=2,
    inter_dim=16,
    balance=(AuxLossFree(), SeqAuxLoss(seq_aux_loss_coeff=1e-4)),
)
MODEL = ModelConfig(
    vocab_size=64,
    dim=32,
    groups=(
        LayerGroup(count=1, attention=mha(), ffn=DenseConfig(inter_dim=64)),
        LayerGroup(count=2, attention=mla(), ffn=MOE),
    ),
    mtp=MTPConfig(),
)


def refused(*assignments: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, override(to_data(MODEL), assignments))
    return str(error.value)


def test_a_config_survives_toml():
    assert parse(ModelConfig, tomllib.loads(to_toml(MODEL))) == MODEL


def test_kind_picks_the_class():
    data = override(
        to_data(MODEL), ["groups.0.ffn={kind='moe', n_routed_experts=4, top_k=1, inter_dim=8}"]
    )
    assert isinstance(parse(ModelConfig, data).groups[0].ffn, MoEConfig)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("dmi=3", "unknown key dmi: did you mean dim?"),
        (
            "groups.1.attention.kv_lora_rnak=3",
            "unknown key groups.1.attention.kv_lora_rnak: did you mean kv_lora_rank?",
        ),
        ("groups.0.attention.kv_lora_rank=3", "unknown key groups.0.attention.kv_lora_rank"),
        ("groups.0.attention.position.teta=3", "did you mean theta?"),
        ("groups.1.ffn.balance.1.seq_aux_loss_coef=1", "did you mean seq_aux_loss_coeff?"),
        ("mtp.n_mtp_module=2", "did you mean n_mtp_modules?"),
        ("dim=wide", "dim cannot be 'wide': input should be a valid integer"),
        ("dim=1.5", "dim cannot be 1.5"),
        ("tie_embeddings=1", "tie_embeddings cannot be 1"),
        ("dim=0", "dim must be at least 1, got 0"),
        ("dim=100000", "dim must be at most 65536"),
        ("groups=[]", "at least one layer group"),
        ("groups.0.attention.kind=mhla", "groups.0.attention.kind cannot be 'mhla': the kinds are"),
        (
            "groups.0.attention.n_kv_heads=3",
            "groups.0.attention: n_heads must be a multiple of n_kv_heads",
        ),
        ("groups.1.ffn.top_k=9", "groups.1.ffn: top_k must be at most 8, got 9"),
        ("vocab_size=none", "vocab_size cannot be None"),
    ],
)
def test_what_cannot_be_is_refused_with_field_got_and_allowed(assignment, sentence):
    assert sentence in refused(assignment)


def test_every_problem_gets_its_own_sentence():
    assert refused("dmi=3", "norm_epz=1").count("unknown key") == 2


def test_a_missing_key_and_a_missing_kind_are_named():
    data = to_data(MODEL)
    del data["groups"][0]["attention"]["n_heads"]
    del data["groups"][1]["ffn"]["kind"]
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, data)
    assert "groups.0.attention.n_heads is missing" in str(error.value)
    assert "groups.1.ffn.kind is missing" in str(error.value)


def leaves(data: object, path: str = "") -> list[str]:
    if isinstance(data, dict):
        return [leaf for key, value in data.items() for leaf in leaves(value, f"{path}{key}.")]
    if isinstance(data, list):
        return [leaf for i, value in enumerate(data) for leaf in leaves(value, f"{path}{i}.")]
    return [path.removesuffix(".")]


def test_single_character_typos_are_refused_and_the_right_key_is_suggested():
    rng = random.Random(0)
    names = [leaf for leaf in leaves(to_data(MODEL)) if not leaf.endswith("kind")]
    suggested = 0
    for _ in range(200):
        name = rng.choice(names)
        parent, _, key = name.rpartition(".")
        at = rng.randrange(len(key))
        typo = key[:at] + rng.choice(string.ascii_lowercase) + key[at + rng.randint(0, 1) :]
        if typo == key:
            typo += "s"
        message = refused(f"{parent}.{typo}=1" if parent else f"{typo}=1")
        suggested += f"did you mean {key}?" in message
    assert suggested >= 190


def test_overrides_reach_tables_lists_and_every_item():
    data = override(to_data(MODEL), ["--dim=48", "groups.*.count=3", "mtp=none", "init_std = 0.1"])
    cfg = parse(ModelConfig, data)
    assert (cfg.dim, cfg.n_layers, cfg.mtp, cfg.init_std) == (48, 6, None, 0.1)


def test_an_override_makes_missing_tables_and_leaves_its_input_alone():
    before = {"a": 1}
    assert override(before, ["b.c=true", "d='x'", "e=plain text"]) == {
        "a": 1,
        "b": {"c": True},
        "d": "x",
        "e": "plain text",
    }
    assert before == {"a": 1}


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("dim", "expected key=value"),
        ("groups.7.count=1", "allowed here is 0 to 1, or \\* for all"),
        ("dim.x.y=1", "inside a plain value"),
    ],
)
def test_an_override_that_points_nowhere_is_refused(assignment, sentence):
    with pytest.raises(ConfigError, match=sentence):
        override(to_data(MODEL), [assignment])


def test_merge_joins_tables_and_replaces_the_rest():
    assert merge({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2]}) == {
        "a": {"x": 1, "y": 3},
        "b": [2],
    }


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*missing\.toml"):
        read_toml(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match=r"is not TOML: .*line 1"):
        read_toml(broken)


def test_keys_lists_every_key_of_every_kind_with_type_and_default():
    listed = {key: (kind, default) for key, kind, default in keys(ModelConfig)}
    assert listed["dim"] == ("int", "required")
    assert listed["norm_eps"] == ("float", "1e-05")
    assert listed["groups.N.attention[mla].kv_lora_rank"] == ("int", "required")
    assert "groups.N.attention[mha].position[decoupled_rope].rope_head_dim" in listed
    assert "groups.N.ffn[moe].balance.N[aux_loss_free].bias_update_speed" in listed
    assert "mtp.mtp_loss_coeff" in listed


def test_the_json_schema_knows_the_kinds_and_forbids_other_keys():
    schema = json_schema(ModelConfig)
    definitions = schema["$defs"]
    assert definitions["MLAConfig"]["additionalProperties"] is False
    assert "kv_lora_rank" in definitions["MLAConfig"]["properties"]


def test_an_axis_that_does_not_exist_yet_is_refused_by_name():
    with pytest.raises(ConfigError, match="tp must be 1, got 4: only dp and ep exist so far"):
        parse(ParallelConfig, {"tp": 4})
