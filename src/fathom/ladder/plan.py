"""A study resolved: every arm's whole run config, its sizes, and how many steps its budget buys.

Nothing is trained and no tensor is made; what cannot be is refused here, with the arm's name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fathom.config import LayerGroup, ModelConfig
from fathom.data.config import DataConfig
from fathom.data.dataset import open_dataset
from fathom.ffn import DenseConfig
from fathom.ladder.differences import GROUPS, Difference, differences
from fathom.ladder.study import Arm, Study
from fathom.layers.base import require
from fathom.settings import ConfigError, override, parse, to_data
from fathom.sizing.count import (
    cache_bytes_per_token,
    flops_per_token,
    num_active_params,
    num_params,
)
from fathom.train.config import RunConfig, identity, read_run_config
from fathom.train.schedule import rows_at

FIT_UNIT = 8  # inter_dim moves by so much: rows of a width that vectorised products like
MAX_STEPS = 10**7


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """An arm ready to be trained.

    Args:
        config: its whole run config, but for the seed and a tuned learning rate.
        fitted: config keys that were set to hold the budget.
        tokens: what each run is trained on.
        params, active_params: of the main model (``fathom.sizing.count``).
        flops_per_token: forward FLOPs at the training length, MTP modules left out.
        train_flops: of one run, MTP modules included: three forward passes.
        cache_bytes_per_token: in bfloat16.
    """

    arm: Arm
    config: RunConfig
    fitted: tuple[str, ...]
    tokens: int
    params: int
    active_params: int
    flops_per_token: float
    train_flops: float
    cache_bytes_per_token: float

    def run_config(self, seed: int, lr: float) -> RunConfig:
        """What one run of this arm is trained with."""
        return replace(self.config, train=replace(self.config.train, seed=seed, lr=lr))

    def sweep_config(self, seed: int, lr: float, share: float) -> RunConfig:
        """A run of a sweep: the same schedule in a share of the steps, measured at its end."""
        cfg = self.run_config(seed, lr)
        steps = max(round(share * cfg.train.steps), cfg.train.warmup_steps, 1)
        every = cfg.train.eval_every if steps == cfg.train.steps else 0
        return replace(cfg, train=replace(cfg.train, steps=steps, eval_every=every))


def plan(study: Study, step_seconds: Mapping[str, float] | None = None) -> list[PlannedArm]:
    """Resolve every arm; the order is the study's.

    Args:
        step_seconds: how long a training step of each arm takes. Only ``hold = "wall_time"`` needs
            it; without it such arms get one step, enough to measure one.

    Raises:
        ConfigError: an arm that cannot be, or one that does not keep to the budget.
    """
    configs: dict[str, RunConfig] = {}
    planned: list[PlannedArm] = []
    for arm in study.arms:
        try:
            parent = configs.get(arm.parent or "")
            cfg, fitted = _changed(parent, arm) if parent else (_root(study, arm), ())
            cfg = _with_steps(cfg, _steps(study, cfg, (step_seconds or {}).get(arm.name)))
        except ValueError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from None
        configs[arm.name] = cfg
        planned.append(_planned(arm, cfg, (*fitted, "train.steps")))
    _check_held(study, planned)
    return planned


def arm_differences(
    planned: list[PlannedArm], rates: Mapping[str, float], *, tuned: bool
) -> dict[str, list[Difference]]:
    """Every arm's differences from its parent, learning rates included; the root has none."""
    data = {p.arm.name: to_data(p.run_config(0, rates[p.arm.name])) for p in planned}
    return {
        p.arm.name: differences(
            data[p.arm.parent],
            data[p.arm.name],
            change=p.arm.change,
            fitted=p.fitted,
            tuned=("train.lr",) if tuned else (),
        )
        if p.arm.parent
        else []
        for p in planned
    }


def config_hash(cfg: RunConfig, fingerprint: str) -> str:
    """Identifies what a run learns: its config, how far it goes, and its data."""
    text = json.dumps([identity(cfg), cfg.train.steps, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of one training token: three forward passes (one forward, a backward worth two).

    An MTP module is one more layer, a projection of twice the width, and one more pass of the head.
    """
    forward = flops_per_token(cfg, seq_len)
    if cfg.mtp is not None:
        last = replace(cfg, mtp=None, groups=(replace(cfg.groups[-1], count=1),))
        module = flops_per_token(last, seq_len) + 4 * cfg.dim**2
        forward += cfg.mtp.n_mtp_modules * module
    return 3 * forward


def _root(study: Study, arm: Arm) -> RunConfig:
    """The study's own tables, and the first arm's change if it has one."""
    data_config = parse(DataConfig, study.data)
    model = {**study.model}
    if "preset" not in model:
        model.setdefault("vocab_size", open_dataset(data_config).vocab_size)
    steps = max(int(study.train.get("warmup_steps", 0)), 1)  # until the budget is known
    train = {"spike_sigmas": 0.0, **study.train, "steps": steps}  # every arm takes every step
    data = {"model": model, "data": study.data, "train": train}
    return read_run_config(data, arm.change)


def _changed(parent: RunConfig, arm: Arm) -> tuple[RunConfig, tuple[str, ...]]:
    cfg = parse(RunConfig, override(to_data(parent), arm.change))
    if arm.fit is None:
        return cfg, ()
    return fit_params(cfg, num_params(parent.model))


def fit_params(cfg: RunConfig, target: int) -> tuple[RunConfig, tuple[str, ...]]:
    """Move every dense FFN's ``inter_dim`` by one amount, to come nearest to ``target`` parameters.

    Returns the config and the keys that were set.

    Raises:
        ValueError: no layer is dense, or what is left for the FFNs is nothing.
    """
    dense = [i for i, group in enumerate(cfg.model.groups) if isinstance(group.ffn, DenseConfig)]
    require(bool(dense), 'fit = "params" changes dense FFNs, and this arm has none')
    now, wider = num_params(cfg.model), num_params(_widened(cfg.model, FIT_UNIT))
    units = round((target - now) / (wider - now))
    model = _widened(cfg.model, units * FIT_UNIT)
    return replace(cfg, model=model), tuple(f"{GROUPS}.{i}.ffn.inter_dim" for i in dense)


def _widened(model: ModelConfig, by: int) -> ModelConfig:
    def widen(group: LayerGroup) -> LayerGroup:
        if not isinstance(group.ffn, DenseConfig):
            return group
        inter_dim = group.ffn.inter_dim + by
        require(
            inter_dim >= FIT_UNIT,
            "the change adds more parameters than the dense FFNs have: make it smaller",
        )
        return replace(group, ffn=replace(group.ffn, inter_dim=inter_dim))

    return replace(model, groups=tuple(map(widen, model.groups)))


def _steps(study: Study, cfg: RunConfig, step_seconds: float | None) -> int:
    """The most steps that stay within the budget."""
    value = study.budget.value
    match study.budget.hold:
        case "active_flops":
            tokens = value / train_flops_per_token(cfg.model, cfg.data.seq_len)
        case "wall_time":
            return max(int(value / step_seconds), 1) if step_seconds else _shortest(cfg)
        case _:
            tokens = value
    for steps, total in _tokens_after(cfg):
        if total > tokens or steps > MAX_STEPS:
            require(
                steps > max(1, cfg.train.warmup_steps),
                f"budget.value buys {steps - 1} steps of {cfg.train.tokens_per_step:,} tokens: "
                "give more, or make train.tokens_per_step and train.warmup_steps smaller",
            )
            return steps - 1
    raise AssertionError("the count of tokens has no end")


def _shortest(cfg: RunConfig) -> int:
    return max(cfg.train.warmup_steps, 1)


def _tokens_after(cfg: RunConfig) -> Iterator[tuple[int, int]]:
    """``(steps, tokens seen after them)`` from the first step on."""
    total, steps = 0, 0
    while True:
        total += rows_at(cfg, steps) * cfg.data.seq_len
        steps += 1
        yield steps, total


def _with_steps(cfg: RunConfig, steps: int) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, steps=steps))


def _planned(arm: Arm, cfg: RunConfig, fitted: tuple[str, ...]) -> PlannedArm:
    model, seq_len = cfg.model, cfg.data.seq_len
    tokens = sum(rows_at(cfg, step) for step in range(cfg.train.steps)) * seq_len
    return PlannedArm(
        arm=arm,
        config=cfg,
        fitted=fitted,
        tokens=tokens,
        params=num_params(model),
        active_params=num_active_params(model),
        flops_per_token=flops_per_token(model, seq_len),
        train_flops=tokens * train_flops_per_token(model, seq_len),
        cache_bytes_per_token=cache_bytes_per_token(model),
    )


def _check_held(study: Study, planned: list[PlannedArm]) -> None:
    """Refuse an arm that does not have what the budget holds equal."""
    hold, tolerance = study.budget.hold, study.budget.tolerance
    if hold not in ("params", "cache_bytes"):
        return
    of = {"params": "params", "cache_bytes": "cache_bytes_per_token"}[hold]
    what = {"params": "parameters", "cache_bytes": "cache bytes per token"}[hold]
    want = getattr(planned[0], of)
    for p in planned:
        got = getattr(p, of)
        if abs(got - want) > tolerance * want:
            raise ConfigError(
                f"arm {p.arm.name} has {got:,.0f} {what}, the first arm {want:,.0f}: "
                f'budget.hold = "{hold}" allows {tolerance:.1%}; '
                'change its sizes, use fit = "params", or hold something else equal'
            )
