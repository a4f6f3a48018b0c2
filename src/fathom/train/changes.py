"""What may change when a run goes on, what needs a word, and what makes it another run.

*Free* keys say how far, how fast and how closely watched. *Consent* keys change the recipe but not
what a checkpoint fits: they need ``--allow-change KEY``. All others are the model, its data or its
seed, and never change within a run.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fathom.convert.run_folder import CONFIG, CheckpointError
from fathom.settings import ConfigError, parse, read_toml, to_data
from fathom.train.config import FREE, RunConfig

Rule = Literal["free", "consent", "never"]
CONSENT = (
    *("train.lr", "train.schedule", "train.warmup_steps", "train.min_lr_ratio"),
    *("train.decay_share", "train.tokens_per_step", "train.ramp_*", "train.betas.*", "train.eps"),
    *("train.muon_momentum", "train.weight_decay", "train.decay_embeddings", "train.grad_clip"),
    *("train.dtype", "train.spike_sigmas", "train.init_from"),
    *("model.groups.*.ffn.balance.*.*_coeff", "model.groups.*.ffn.balance.*.bias_update_speed"),
    *("model.mtp.*_coeff", "model.mtp.late_from"),
)


class Change(NamedTuple):
    """A key with another value than before; ``None``: the key was, or is, not there."""

    key: str
    was: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        was, now = ("none" if value is None else value for value in (self.was, self.now))
        return f"{self.key} was {was} and is {now}"


def changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every key in which two configs of a run differ, by name."""
    theirs, ours = flat(to_data(before)), flat(to_data(now))
    keys = sorted(theirs.keys() | ours.keys())
    return [
        Change(key, theirs.get(key), ours.get(key), rule_of(key))
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]


def rule_of(key: str) -> Rule:
    """Whether a key may change when a run goes on."""
    section, _, name = key.partition(".")
    if section == "parallel" or key == "data.workers" or (section == "train" and name in FREE):
        return "free"
    return "consent" if any(fnmatchcase(key, pattern) for pattern in CONSENT) else "never"


def check_same_run(folder: Path, cfg: RunConfig, allowed: Sequence[str] = ()) -> list[Change]:
    """What differs from the folder's config, all of it allowed.

    Args:
        allowed: consent keys, or patterns such as ``train.*``, that may have changed.

    Raises:
        ConfigError: a key that may not, with both values and what to do.
    """
    found = changes(read_config(folder), cfg)
    never = [change for change in found if change.rule == "never"]
    if never:
        raise ConfigError(
            f"{folder} is of another run: {_listed(never)}; "
            "name another folder with --out, or put the config back"
        )
    asked = [
        change
        for change in found
        if change.rule == "consent" and not any(fnmatchcase(change.key, key) for key in allowed)
    ]
    if asked:
        agree = " ".join(f"--allow-change {change.key}" for change in asked)
        raise ConfigError(
            f"{folder} began with another recipe: {_listed(asked)}; name another folder with "
            f"--out, put the config back, or go on with the change by {agree}"
        )
    return found


def _listed(found: Sequence[Change]) -> str:
    more = f", and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(map(str, found[:4])) + more


def read_config(folder: Path) -> RunConfig:
    """The config of a run or checkpoint folder."""
    try:
        return parse(RunConfig, read_toml(folder / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {error}") from None


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one dictionary of dotted keys."""
    if isinstance(data, list):
        data = {str(index): item for index, item in enumerate(data)}
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    return {k: v for key, item in data.items() for k, v in flat(item, f"{prefix}{key}.").items()}
