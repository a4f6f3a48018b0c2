"""``config.json``: both spellings in and out, nothing lost, nothing that matters ignored."""

import json
from dataclasses import replace
from typing import Any

import pytest

import fathom
from fathom.attention import MHAConfig, MLAConfig
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.convert.families import FAMILIES, read_config, write_config
from fathom.convert.hf_config import NEUTRAL, respelled
from fathom.convert.run_folder import CheckpointError
from fathom.ffn import DenseConfig, MoEConfig
from fathom.ffn.balance import AuxLoss, AuxLossFree, SeqAuxLoss
from fathom.layers.position import (
    AlibiConfig,
    DecoupledRopeConfig,
    NoPositionConfig,
    RopeConfig,
)
from fathom.layers.rope import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from peers import CASES, LLAMA, LLAMA3, V2, V3, yarn

V1: dict[str, Any] = {
    "model_type": "deepseek",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}
READ = {**CASES, "v1": V1, "kimi": {**V3, "model_type": "kimi_k2"}}


def read(config: dict[str, Any], **changes: Any) -> ModelConfig:
    return read_config({**config, **changes}, "config.json")


def position(config: dict[str, Any], **changes: Any) -> RopeConfig:
    attention = read(config, **changes).groups[0].attention
    assert isinstance(attention, MHAConfig | MLAConfig)
    assert isinstance(attention.position, RopeConfig)
    return attention.position


def experts(config: dict[str, Any], **changes: Any) -> MoEConfig:
    ffn = read(config, **changes).groups[-1].ffn
    assert isinstance(ffn, MoEConfig)
    return ffn


# --- What is read ---


def test_a_llama_config_is_read_key_by_key():
    config = {**LLAMA, "head_dim": 12, "tie_word_embeddings": True, "attention_bias": True}
    attention = MHAConfig(
        n_heads=4, n_kv_heads=2, head_dim=12, position=RopeConfig(), qkv_bias=True, out_bias=True
    )
    assert read(config, initializer_range=0.1) == ModelConfig(
        vocab_size=96,
        dim=32,
        groups=(LayerGroup(count=2, attention=attention, ffn=DenseConfig(inter_dim=44)),),
        max_seq_len=128,
        norm_eps=1e-5,
        tie_embeddings=True,
        init_std=0.1,
    )


def test_a_v3_config_is_read_key_by_key():
    attention = MLAConfig(
        n_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        position=RopeConfig(),
    )
    moe = MoEConfig(
        n_routed_experts=16,
        n_shared_experts=2,
        top_k=3,
        inter_dim=16,
        score_func="sigmoid",
        n_expert_groups=4,
        n_limited_groups=2,
        group_score="top2",
        norm_topk_prob=True,
        route_scale=2.5,
        expert_bias=True,
    )
    assert read(V3, num_nextn_predict_layers=2) == ModelConfig(
        vocab_size=96,
        dim=32,
        groups=(
            LayerGroup(count=1, attention=attention, ffn=DenseConfig(inter_dim=40)),
            LayerGroup(count=2, attention=attention, ffn=moe),
        ),
        max_seq_len=128,
        norm_eps=1e-5,
        mtp=MTPConfig(n_mtp_modules=2),
    )


def test_what_old_llama_configs_leave_out_has_its_old_meaning():
    old = {key: LLAMA[key] for key in LLAMA if "key_value" not in key and "max_pos" not in key}
    cfg = read(old)
    attention = cfg.groups[0].attention
    assert isinstance(attention, MHAConfig)
    assert (attention.n_kv_heads, attention.head_dim, cfg.max_seq_len) == (4, 8, 2048)
    assert not attention.qkv_bias
    assert not cfg.tie_embeddings


def test_v2_follows_groups_only_where_its_method_says_so():
    groups = {"n_group": 4, "topk_group": 2}
    assert experts(V2, **groups).n_expert_groups == 1
    limited = experts(V2, topk_method="group_limited_greedy", **groups)
    assert (limited.n_expert_groups, limited.n_limited_groups) == (4, 2)
    assert limited.group_score == "max"


def test_v1_does_not_normalise_the_score_of_a_single_expert():
    assert experts(V1, norm_topk_prob=True).norm_topk_prob
    assert not experts(V1, norm_topk_prob=True, num_experts_per_tok=1).norm_topk_prob


def test_the_balance_loss_of_v1_and_v2_is_kept_for_training():
    assert experts(V1).balance == (SeqAuxLoss(seq_aux_loss_coeff=0.001),)
    assert experts(V1, seq_aux=False).balance == (AuxLoss(aux_loss_coeff=0.001),)
    assert experts(V1, aux_loss_alpha=0.0).balance == ()
    assert experts(V2).balance == ()


@pytest.mark.parametrize(("first", "counts"), [(0, [3]), (2, [2, 1]), (3, [3]), (9, [3])])
def test_the_first_layers_are_dense(first, counts):
    groups = read(V3, first_k_dense_replace=first).groups
    assert [group.count for group in groups] == counts
    assert isinstance(groups[0].ffn, DenseConfig) == (first > 0)


def test_transformers_own_name_of_the_mtp_count_is_read():
    config = {key: value for key, value in V3.items() if key != "num_nextn_predict_layers"}
    assert read(config).mtp is None
    assert read(config, num_mtp_layers=1).mtp == MTPConfig()


# --- RoPE ---

SCALINGS = {
    "linear": ({"factor": 4}, LinearScaling(factor=4.0)),
    "dynamic": ({"factor": 2.0}, DynamicScaling(factor=2.0, original_seq_len=128)),
    "llama3": (LLAMA3, Llama3Scaling(factor=8.0, original_seq_len=32)),
    "yarn": (
        {**yarn(0.707), "beta_fast": 16, "beta_slow": 2},
        YarnScaling(
            factor=8.0,
            original_seq_len=16,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_v4_and_v5_say_the_same_rope_in_two_spellings(kind):
    rope, scaling = SCALINGS[kind]
    rope = {**rope, "rope_type": kind}
    want = RopeConfig(theta=500.0, scaling=scaling)
    old = {key: value for key, value in rope.items() if key != "rope_type"} | {"type": kind}
    assert position(LLAMA, rope_scaling=old, rope_theta=500) == want
    assert position(LLAMA, rope_scaling=rope, rope_theta=500.0) == want
    assert position(LLAMA, rope_parameters={**rope, "rope_theta": 500.0}) == want
    both = respelled({**LLAMA, "rope_scaling": rope, "rope_theta": 500.0}, None)
    v4_keys = {key: value for key, value in both.items() if key != "rope_parameters"}
    v5_keys = {k: v for k, v in both.items() if k not in ("rope_scaling", "rope_theta")}
    assert position(both) == position(v4_keys) == position(v5_keys) == want


def test_rope_without_scaling_is_said_in_both_spellings():
    assert position(LLAMA) == RopeConfig()
    assert position(LLAMA, rope_theta=1e6) == RopeConfig(theta=1e6)
    assert position(LLAMA, rope_scaling=None, rope_theta=1e6) == RopeConfig(theta=1e6)
    v5 = {"rope_type": "default", "rope_theta": 1e6}
    assert position(LLAMA, rope_parameters=v5) == RopeConfig(theta=1e6)
    both = respelled({**LLAMA, "rope_parameters": v5}, None)
    assert both["rope_theta"] == 1e6
    assert both["rope_scaling"] is None
    assert both["rope_parameters"] == v5


def test_rope_scaling_goes_before_rope_parameters():
    linear = {"type": "linear", "factor": 2.0}
    v5 = {"rope_type": "default", "rope_theta": 1e6}
    both = position(LLAMA, rope_scaling=linear, rope_parameters=v5, rope_theta=7.0)
    assert both == RopeConfig(theta=7.0, scaling=LinearScaling(factor=2.0))


def test_yarn_fills_what_is_absent_null_or_zero():
    rope = {"type": "yarn", "factor": None, "beta_fast": 0, "beta_slow": None, "mscale": 0}
    scaling = position(LLAMA, rope_scaling={**rope, "original_max_position_embeddings": 32}).scaling
    assert scaling == YarnScaling(factor=4.0, original_seq_len=32)
    assert position(LLAMA, rope_scaling={"type": "yarn", "factor": 2}).scaling == YarnScaling(
        factor=2.0, original_seq_len=128
    )
    beside = position(LLAMA, rope_scaling=yarn(), original_max_position_embeddings=64).scaling
    assert beside == YarnScaling(factor=8.0, original_seq_len=64)


def test_a_context_that_rope_stretches_by_itself_is_the_stretched_one():
    dynamic = {"rope_type": "dynamic", "factor": 2.5}
    cfg = read(LLAMA, rope_scaling=dynamic)
    assert cfg.max_seq_len == 320
    assert write_config(cfg)["max_position_embeddings"] == 128


# --- What is refused ---


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_key_that_would_change_the_numbers_is_refused_by_name(key):
    other: Any = {"hidden_act": "gelu", "mlp_layer_types": ["dense"]}.get(key, 7)
    with pytest.raises(CheckpointError, match=f"{key} is"):
        read(LLAMA, **{key: other})
    for same in (None, *NEUTRAL[key]):
        assert read(LLAMA, **{key: same}) == read(LLAMA)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {"model_type": "mamba"}),
        (LLAMA, {"model_type": None}),
        (LLAMA, {"model_type": ["llama"]}),
        (LLAMA, {"layer_types": ["sliding_attention", "full_attention"]}),
        (LLAMA, {"layer_types": 3}),
        (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2}}),
        (LLAMA, {"rope_scaling": {"type": ["yarn"], "factor": 2}}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2, "mscale_all_dim": 1}}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}),
        (LLAMA, {"rope_scaling": {"type": "linear"}}),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2, "finetuned": True}}),
        (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 1}}),
        (LLAMA, {"rope_scaling": "yarn"}),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        (LLAMA, {"rope_theta": 1.0}),
        (LLAMA, {"rms_norm_eps": 0}),
        (LLAMA, {"rms_norm_eps": "1e-5"}),
        (LLAMA, {"tie_word_embeddings": 1}),
        (LLAMA, {"num_key_value_heads": 3}),
        (LLAMA, {"head_dim": 7}),
        (LLAMA, {"num_attention_heads": 2**12}),
        (V1, {"scoring_func": "sigmoid"}),
        (V1, {"topk_method": "noaux_tc"}),
        (V1, {"routed_scaling_factor": 2.5}),
        (V1, {"n_routed_experts": None}),
        (V2, {"scoring_func": "sigmoid"}),
        (V2, {"topk_method": "noaux_tc"}),
        (V2, {"norm_topk_prob": True}),
        (V2, {"mlp_bias": True}),
        (V2, {"num_key_value_heads": 2}),
        (V3, {"scoring_func": "softmax"}),
        (V3, {"topk_method": "greedy"}),
        (V3, {"n_group": 3}),
        (V3, {"n_group": 16}),
        (V3, {"topk_group": 5}),
        (V3, {"qk_rope_head_dim": 7}),
        (V3, {"rope_interleave": "yes"}),
        (V3, {"first_k_dense_replace": 3, "num_nextn_predict_layers": 1}),
        (V3, {"first_k_dense_replace": None}),
    ],
    ids=lambda value: json.dumps(value)[:60] if len(str(value)) < 90 else value["model_type"],
)
def test_what_is_not_followed_is_refused(config, changes):
    with pytest.raises(CheckpointError, match=r"^config\.json.* cannot be used: "):
        read(config, **changes)


@pytest.mark.parametrize("key", ["q_lora_rank", "norm_topk_prob", "first_k_dense_replace"])
def test_a_key_of_v3_that_is_absent_is_asked_for(key):
    with pytest.raises(CheckpointError, match=key):
        read_config({k: v for k, v in V3.items() if k != key}, "config.json")


ABSURD = (0, -1, 2**31, 10**30, 1.5, "32", True, [32], {}, float("inf"))


COUNTS = {
    "llama": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings",
    "v3": "kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim n_routed_experts "
    "num_experts_per_tok moe_intermediate_size n_group topk_group",
}


@pytest.mark.parametrize(
    ("case", "key"), [(case, key) for case, keys in COUNTS.items() for key in keys.split()]
)
def test_absurd_numbers_are_refused_by_the_name_of_their_key(case, key):
    for value in ABSURD:
        with pytest.raises(CheckpointError, match=key):
            read(CASES[case], **{key: value})


# --- What is written ---


@pytest.mark.parametrize("case", READ)
def test_a_config_that_is_written_anew_means_the_same(case):
    cfg = read(READ[case])
    assert read_config(respelled(write_config(cfg), "float32"), "again") == cfg


@pytest.mark.parametrize("case", READ)
def test_unknown_keys_survive_and_code_does_not(case):
    config = {**READ[case], "ep_size": 1, "of_later": {"a": [1]}, "auto_map": {"AutoModel": "x.Y"}}
    written = respelled(config, "bfloat16")
    assert written["of_later"] == {"a": [1]}
    assert written["ep_size"] == 1
    assert "auto_map" not in written
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert read_config(written, "again") == read_config(config, "first")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_either_name_of_the_dtype_is_understood(key):
    written = respelled({**LLAMA, key: "bfloat16"}, None)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert respelled({**LLAMA, key: "auto"}, None)[key] == "auto"


# A V3 router beside MHA; sparse attention that no family has; an indexer without a query latent.
UNKNOWN_TO_FAMILIES = {"tiny-moe", "tiny-moba", "tiny-nsa", "tiny-dsa"}
WRITABLE = [name for name in fathom.PRESETS if name not in UNKNOWN_TO_FAMILIES]


@pytest.mark.parametrize("name", WRITABLE)
def test_every_preset_of_a_released_kind_has_a_family(name):
    cfg = fathom.preset(name)
    again = read_config(write_config(cfg), name)
    assert fathom.size(again, seq_len=7) == fathom.size(cfg, seq_len=7)
    assert again.init_std == cfg.init_std
    assert (again.mtp is None) == (cfg.mtp is None)


def test_families_are_chosen_by_the_parts_of_a_model():
    types = {name: write_config(fathom.preset(name))["model_type"] for name in WRITABLE}
    assert types["smollm2-135m"] == types["llama-3-8b"] == "llama"
    assert types["deepseek-moe-16b"] == "deepseek"
    assert types["deepseek-v2-lite"] == types["deepseek-v2"] == "deepseek_v2"
    assert types["deepseek-v3"] == types["moonlight-16b-a3b"] == types["tiny-mla"] == "deepseek_v3"
    assert set(types.values()) < set(FAMILIES)


ROPE = RopeConfig()
MHA = MHAConfig(n_heads=2, n_kv_heads=2, head_dim=8, position=ROPE)
SOME_MLA = MLAConfig(
    n_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, position=ROPE
)
DENSE = DenseConfig(inter_dim=24)
MOE = MoEConfig(n_routed_experts=4, top_k=2, inter_dim=8)
SIGMOID = replace(MOE, score_func="sigmoid")


def model(*layers: tuple[Any, Any], mtp: MTPConfig | None = None) -> ModelConfig:
    groups = tuple(LayerGroup(count=1, attention=a, ffn=f) for a, f in layers)
    return ModelConfig(vocab_size=64, dim=16, groups=groups, mtp=mtp)


UNWRITABLE = {
    "two attentions": model((MHA, DENSE), (SOME_MLA, DENSE)),
    "two widths": model((MHA, DENSE), (MHA, DenseConfig(inter_dim=16))),
    "experts first": model((MHA, MOE), (MHA, DENSE)),
    "MTP without MLA": model((MHA, DENSE), mtp=MTPConfig()),
    "alibi": model((replace(MHA, position=AlibiConfig()), DENSE)),
    "no position": model((replace(MHA, position=NoPositionConfig()), DENSE)),
    "decoupled": model((replace(MHA, position=DecoupledRopeConfig(rope_head_dim=4)), DENSE)),
    "window": model((replace(MHA, window_size=4), DENSE)),
    "shared query": model((replace(MHA, shared_query=True), DENSE)),
    "one bias": model((replace(MHA, qkv_bias=True), DENSE)),
    "biased MLP and MLA": model((SOME_MLA, DenseConfig(inter_dim=8, bias=True))),
    "sigmoid and MHA": model((MHA, SIGMOID)),
    "softmax that is normalised": model((SOME_MLA, replace(MOE, norm_topk_prob=True))),
    "softmax with a bias": model((SOME_MLA, replace(MOE, expert_bias=True))),
    "sqrt_softplus": model((SOME_MLA, replace(MOE, score_func="sqrt_softplus"))),
    "softmax with top2": model(
        (SOME_MLA, replace(MOE, n_expert_groups=2, n_limited_groups=1, group_score="top2"))
    ),
    "sigmoid with max": model((SOME_MLA, replace(SIGMOID, n_expert_groups=2, n_limited_groups=1))),
    "scaled V1": model((MHA, replace(MOE, route_scale=2.0))),
    "V2 with MTP": model((SOME_MLA, MOE), mtp=MTPConfig()),
    "MTP before the norm": model((SOME_MLA, SIGMOID), mtp=MTPConfig(post_norm_hidden=False)),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_model_that_no_family_has_is_refused(case):
    with pytest.raises(ValueError, match="cannot be written for Hugging Face"):
        write_config(UNWRITABLE[case])


def test_an_mla_model_of_dense_layers_is_a_v3_whose_experts_come_after_the_last_layer():
    for mtp, first in ((None, 2), (MTPConfig(n_mtp_modules=2), 4)):
        cfg = model((SOME_MLA, DENSE), (SOME_MLA, DENSE), mtp=mtp)
        config = write_config(cfg)
        assert (config["model_type"], config["first_k_dense_replace"]) == ("deepseek_v3", first)
        assert read_config(config, "again").n_layers == 2


def test_loss_free_balance_is_read_back_as_a_fixed_bias():
    balanced = replace(SIGMOID, balance=(AuxLossFree(),))
    again = read_config(write_config(model((SOME_MLA, balanced))), "again")
    assert again.groups[0].ffn == replace(SIGMOID, expert_bias=True, group_score="top2")
