"""What may change when a run goes on, what needs a word, and what never may."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fathom.convert.run_folder import CheckpointError
from fathom.settings import ConfigError, to_data, to_toml
from fathom.train.changes import CONSENT, check_same_run, flat, rule_of


@pytest.fixture
def begun(make_config, run_dir) -> Path:
    """A run folder with the usual config in it."""
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(to_toml(make_config()))
    return run_dir


def test_free_keys_change_and_are_told(begun, make_config):
    found = check_same_run(begun, make_config("train.save_every=1", "data.workers=2"))
    assert list(map(str, found)) == [
        "data.workers was 0 and is 2",
        "train.save_every was 500 and is 1",
    ]


def test_keys_of_another_run_are_named_with_both_values(begun, make_config):
    other = make_config("model.groups.1.ffn.top_k=1", "train.seed=4", "train.lr=1")
    with pytest.raises(ConfigError) as caught:
        check_same_run(begun, other, allowed=["*"])
    assert "model.groups.1.ffn.top_k was 2 and is 1" in str(caught.value)
    assert "train.seed was 0 and is 4" in str(caught.value)
    assert "train.lr" not in str(caught.value)
    assert "--out" in str(caught.value)


def test_the_recipe_changes_with_consent_key_by_key(begun, make_config):
    other = make_config("train.lr=0.5", "train.weight_decay=0")
    with pytest.raises(ConfigError, match=r"--allow-change train\.lr --allow-change train\.weight"):
        check_same_run(begun, other)
    with pytest.raises(ConfigError, match=r"train\.weight_decay was 0\.1 and is 0\.0"):
        check_same_run(begun, other, allowed=["train.lr"])
    for allowed in (["train.lr", "train.weight_decay"], ["train.*"]):
        assert len(check_same_run(begun, other, allowed)) == 2


def test_a_key_that_appears_was_none(begun, make_config):
    with pytest.raises(ConfigError, match=r"train\.init_from was none and is elsewhere"):
        check_same_run(begun, make_config("train.init_from=elsewhere"))


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("train.steps", "free"),
        ("parallel.dp", "free"),
        ("train.betas.1", "consent"),
        ("model.groups.1.ffn.balance.0.bias_update_speed", "consent"),
        ("model.mtp.mtp_loss_coeff", "consent"),
        ("model.mtp.n_mtp_modules", "never"),
        ("train.seed", "never"),
        ("train.optimizer", "never"),
        ("data.seq_len", "never"),
        ("a.key.of.the.future", "never"),
    ],
)
def test_every_key_has_a_rule_and_unknown_ones_the_strictest(key, rule):
    assert rule_of(key) == rule


def test_every_pattern_of_consent_is_a_key_that_exists(make_config):
    cfg = make_config("train.ramp_from_tokens=32", "train.ramp_steps=3", "train.init_from=x")
    known = set(flat(to_data(cfg)))
    assert [p for p in CONSENT if not any(fnmatchcase(key, p) for key in known)] == []


def test_a_folders_config_that_cannot_be_read_is_an_unusable_checkpoint(make_config, run_dir):
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("model = 3")
    with pytest.raises(CheckpointError, match=r"config\.toml cannot be used"):
        check_same_run(run_dir, make_config())
