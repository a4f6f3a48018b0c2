"""A run's config: presets, overrides, bounds, and what may change when a run goes on."""

from dataclasses import replace
from pathlib import Path

import pytest

from fathom.presets import preset
from fathom.settings import ConfigError, to_toml
from fathom.train.config import FREE, RunConfig, TrainConfig, identity, read_run_config
from fathom.train.schedule import rows_at

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
TINY = {"model": {"preset": "tiny-mla"}, "train": {"steps": 5}}


def test_a_preset_stands_for_its_keys():
    assert read_run_config(TINY).model == preset("tiny-mla")


def test_model_keys_go_over_the_preset_and_overrides_over_both():
    data = {**TINY, "model": {"preset": "tiny-mla", "norm_eps": 1e-3, "init_std": 0.5}}
    over = ["model.init_std=0.25", "model.groups.0.attention.kv_lora_rank=48"]
    model = read_run_config(data, over).model
    assert (model.norm_eps, model.init_std) == (1e-3, 0.25)
    assert model.groups[0].attention.kv_lora_rank == 48
    assert model.dim == preset("tiny-mla").dim


def test_the_preset_itself_can_be_overridden_before_keys_inside_it():
    over = ["model.groups.0.attention.n_kv_heads=1", "model.preset=tiny-gqa"]
    assert read_run_config(TINY, over).model.groups[0].attention.n_kv_heads == 1


@pytest.mark.parametrize("name", ["tiny-mlaa", 3], ids=str)
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ConfigError, match="preset"):
        read_run_config({"model": {"preset": name}, "train": {"steps": 5}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_a_run_that_round_trips(path, tmp_path):
    cfg = read_run_config(path)
    (tmp_path / "config.toml").write_text(to_toml(cfg))
    assert read_run_config(tmp_path / "config.toml") == cfg


def test_options_that_are_switched_off_stay_off_in_the_written_config(tmp_path):
    off = ["train.grad_clip=0", "train.eval_every=0", "train.micro_batch_size=none"]
    cfg = read_run_config(TINY, off)
    (tmp_path / "config.toml").write_text(to_toml(cfg))
    assert read_run_config(tmp_path / "config.toml") == cfg


def test_the_tiny_config_trains_tiny_deepseek_in_batches_that_four_ranks_can_share():
    cfg = read_run_config(next(path for path in CONFIGS if path.stem == "tiny"))
    assert cfg.model == preset("tiny-deepseek")
    assert cfg.data.source == "bundled"
    assert all(rows_at(cfg, step) % 4 == 0 for step in range(cfg.train.steps))


BAD = {
    "steps=0": "steps",
    "lr=0": "lr",
    "lr=inf": "lr",
    "lr=nan": "lr",
    "eps=0": "eps",
    "seed=-1": "seed",
    "tokens_per_step=0": "tokens_per_step",
    "micro_batch_size=0": "micro_batch_size",
    "warmup_steps=6": "warmup_steps",
    "warmup_steps=-1": "warmup_steps",
    "min_lr_ratio=1.5": "min_lr_ratio",
    "decay_share=-0.1": "decay_share",
    "weight_decay=-1": "weight_decay",
    "betas=[0.9,1.0]": "betas",
    "muon_momentum=1": "muon_momentum",
    "grad_clip=-1": "grad_clip",
    "keep=1": "keep",
    "save_every=0": "save_every",
    "eval_every=-1": "eval_every",
    "eval_bytes=0": "eval_bytes",
    "log_every=0": "log_every",
    "ramp_steps=3": "ramp_from_tokens",
    "ramp_steps=-1": "ramp_steps",
    "schedule=linear": "schedule",
    "optimizer=sgd": "optimizer",
    "dtype=fp16": "dtype",
    "steps=1.5": "steps",
}


@pytest.mark.parametrize("assignment", BAD)
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_field(assignment):
    with pytest.raises(ConfigError, match=f"train.*{BAD[assignment]}"):
        read_run_config(TINY, [f"train.{assignment}"])


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match="did you mean warmup_steps"):
        read_run_config(TINY, ["train.warmup_step=3"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.tokens_per_step=1000"], "must be a multiple of data.seq_len .256.: 1024 is"),
        (["train.tokens_per_step=100"], "256 is"),
        (["train.micro_batch_size=5"], "32 rows of 256 tokens"),
        (["data.seq_len=1024", "train.tokens_per_step=1024"], "max_seq_len .512."),
        (["train.ramp_steps=5", "train.ramp_from_tokens=100"], "ramp_from_tokens"),
        (["train.ramp_steps=5", "train.ramp_from_tokens=16384"], "at most tokens_per_step"),
        (["train.rounding=master"], "needs train.dtype=bf16 and train.optimizer=adamw"),
        (["model.preset=tiny-deepseek", "data.seq_len=1"], "nothing that far ahead"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_keys_that_do_not_fit_each_other_are_refused_with_a_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_run_config(TINY, overrides)


def test_two_runs_are_the_same_if_only_free_keys_differ():
    cfg = read_run_config(TINY)
    other = {
        **{"steps": 7, "micro_batch_size": 4, "device": "cpu", "save_every": 3, "keep": 5},
        **{"eval_every": 3, "eval_bytes": 9, "sample_every": 2, "log_every": 1, "compile": True},
        **{"activation_checkpointing": True, "deterministic": True, "log_load": True},
        **{"repeat_every": 9, "hang_seconds": 60.0, "async_save": True, "keep_every": 100},
        "cuda_graph": True,
    }
    assert set(other) == set(FREE)
    changed = replace(cfg, train=replace(cfg.train, **other))
    assert identity(changed) == identity(cfg)
    assert identity(replace(cfg, data=replace(cfg.data, workers=3))) == identity(cfg)


@pytest.mark.parametrize(
    "assignment", ["train.lr=1e-4", "train.seed=1", "data.seq_len=128", "model.norm_eps=1e-3"]
)
def test_two_runs_differ_if_what_is_learnt_differs(assignment):
    assert identity(read_run_config(TINY, [assignment])) != identity(read_run_config(TINY))


def test_a_config_needs_a_model_and_a_number_of_steps():
    with pytest.raises(ConfigError, match="model is missing"):
        read_run_config({"train": {"steps": 5}})
    with pytest.raises(ConfigError, match=r"train\.steps is missing"):
        read_run_config({"model": {"preset": "tiny-mla"}, "train": {}})


def test_defaults_are_in_bounds():
    assert isinstance(RunConfig(model=preset("tiny-llama"), train=TrainConfig(steps=1)), RunConfig)
