"""``fathom compare``: the ladder's verdict on run folders that exist already.

Runs of one config with different seeds are one arm; the first run's arm is the others' parent.
Every run is measured on all of its held-out text, unless a ladder has done so.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fathom.data.dataset import open_dataset
from fathom.ladder.differences import differences
from fathom.ladder.results import evaluation_interval, judge_pairs, paired, scores
from fathom.ladder.task import read_object
from fathom.ladder.work import RESULT, evaluate_run, evaluation_data
from fathom.settings import ConfigError, Data, to_data
from fathom.train.changes import read_config
from fathom.train.config import RunConfig, identity

MARGIN = 0.01


@dataclass
class ComparedArm:
    """Runs that differ in their seed alone, by seed; named by the folder of the first."""

    name: str
    cfg: RunConfig
    folders: dict[int, Path] = field(default_factory=dict)


def compare_runs(paths: Sequence[Path], *, margin: float = MARGIN) -> Data:
    """Judge runs against the first.

    Args:
        margin: differences within so many bits per byte are ``same``.

    Returns:
        ``{"margin": ..., "arms": [...]}``; the keys of an arm are those of ``results.json``.

    Raises:
        ConfigError: runs of one config only, a seed twice, or runs measured on different text.
        CheckpointError: a folder that is no trained run.
    """
    arms = _arms(paths)
    _check_data([arm.cfg for arm in arms])
    runs = {
        arm.name: {seed: measured(folder, arm.cfg) for seed, folder in arm.folders.items()}
        for arm in arms
    }
    first, *others = arms
    pairs = {arm.name: paired(runs[arm.name], runs[first.name]) for arm in others}
    verdicts = judge_pairs(pairs, {arm.name: first.name for arm in others}, margin=margin)
    return {
        "margin": margin,
        "arms": [_row(arm, first, runs[arm.name], verdicts.get(arm.name)) for arm in arms],
    }


def _arms(paths: Sequence[Path]) -> list[ComparedArm]:
    """The runs by config, in the order given."""
    arms: dict[str, ComparedArm] = {}
    for path in paths:
        cfg = read_config(path)
        seed = cfg.train.seed
        alike = json.dumps([identity(_with_seed(cfg, 0)), cfg.train.steps], sort_keys=True)
        arm = arms.setdefault(alike, ComparedArm(path.as_posix(), cfg))
        if seed in arm.folders:
            raise ConfigError(
                f"{path} and {arm.folders[seed]} are one config with one seed, {seed}"
            )
        arm.folders[seed] = path
    if len(arms) < 2:
        raise ConfigError(
            f"compare needs runs of two configs or more, got {len(paths)} of {len(arms)}: "
            "runs that differ in their seed alone are one arm"
        )
    return list(arms.values())


def _with_seed(cfg: RunConfig, seed: int) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, seed=seed))


def _check_data(configs: Sequence[RunConfig]) -> None:
    """Bits per byte compare across tokenizers, but not across texts or contexts."""
    first = configs[0].data
    for cfg in configs[1:]:
        if (cfg.data.source, cfg.data.seq_len) != (first.source, first.seq_len):
            raise ConfigError(
                "the runs are not measured alike: data.source and data.seq_len are "
                f"{cfg.data.source} and {cfg.data.seq_len} here, {first.source} and "
                f"{first.seq_len} in the first run"
            )


def measured(run: Path, cfg: RunConfig) -> Data:
    """A run's held-out losses: what a ladder left, or measured now."""
    known = read_object(run / RESULT)
    if known is not None and known.get("documents"):
        return known
    found = evaluation_data(evaluate_run(run, cfg, open_dataset(cfg.data)))
    if found["val_bpb"] is None:
        raise ConfigError(f"{run} was trained on no text: runs are compared in bits per byte")
    return {"seed": cfg.train.seed, **found}


def _row(arm: ComparedArm, first: ComparedArm, runs: dict[int, Data], verdict: Data | None) -> Data:
    found = differences(to_data(_with_seed(first.cfg, 0)), to_data(_with_seed(arm.cfg, 0)))
    ordered = [runs[seed] for seed in sorted(runs)]
    return {
        "name": arm.name,
        "parent": None if arm is first else first.name,
        "differs": [difference.key for difference in found],
        "differences": [asdict(difference) for difference in found],
        "seeds": [{"seed": run["seed"], "val_bpb": run["val_bpb"]} for run in ordered],
        "val_bpb": scores(ordered),
        "evaluation_interval": evaluation_interval(ordered),
        "verdict": verdict,
    }
