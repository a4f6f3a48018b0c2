"""The whole of a run, all that ``fathom train`` reads: model, data, training and layout.

Every bound is checked here, before a tensor is made or a file is written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fathom.config import ModelConfig, ParallelConfig
from fathom.data.config import DataConfig
from fathom.layers.base import Config, require, require_positive
from fathom.presets import preset
from fathom.settings import ConfigError, Data, merge, override, parse, read_toml, to_data

Schedule = Literal["constant", "cosine", "wsd", "deepseek_v3", "multi_step"]
OptimizerName = Literal["adamw", "muon"]
Precision = Literal["float32", "bf16_autocast", "bf16"]
Rounding = Literal["nearest", "stochastic", "master"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How a model is trained. Batch sizes are global.

    Args:
        steps: optimizer steps in all.
        lr: highest learning rate.
        seed: of the initial weights and of the order of the data.
        tokens_per_step: tokens of one optimizer step, a multiple of ``data.seq_len``.
        micro_batch_size: rows (of ``data.seq_len`` tokens) per forward; gradients accumulate until
            the step has its tokens. None: all rows at once.
        ramp_from_tokens: tokens of the first step, from where the batch grows to all.
        ramp_steps: over how many steps it grows.
        warmup_steps: over how many steps the rate rises to ``lr``, linearly.
        schedule: what follows (``train/schedule.py``).
        min_lr_ratio: the lowest rate as a share of ``lr`` (cosine, wsd).
        decay_share: the share of the steps in which wsd falls.
        optimizer: AdamW; or Muon for hidden matrices with AdamW for the rest.
        betas, eps: AdamW's.
        muon_momentum: Muon's.
        weight_decay: of matrices, decoupled; never of norms and biases.
        decay_embeddings: whether the embedding decays too.
        grad_clip: the highest global gradient norm; 0: no clipping.
        dtype: float32; bf16_autocast (float32 weights, bfloat16 arithmetic); bf16 (everything
            bfloat16: half the memory, but small updates round away).
        rounding: how bf16 weights take an update: to the nearest; stochastic: up or down by chance,
            right on average; master: AdamW keeps 16 more bits of each, so they are float32 weights
            to it (``ops/rounding.py``).
        device: auto is cuda where there is one, else cpu.
        compile: compile each block with ``torch.compile``.
        cuda_graph: record forward and backward as CUDA graphs and replay them: for models so small
            that launching kernels takes longer than running them. On one GPU.
        activation_checkpointing: recompute each block in the backward pass, to save memory.
        deterministic: refuse operations whose result may differ from run to run.
        spike_sigmas: a step whose loss is so many standard deviations above those of the last 128
            steps, or its gradient norm seven times as high, is skipped (``train/guards.py``); 0:
            never.
        repeat_every: steps between those whose gradients are computed twice and compared bit by
            bit, against hardware that errs; 0: never. Needs ``deterministic``.
        hang_seconds: a step that takes longer, and ten times the median, ends the process with the
            stacks of all threads.
        save_every: steps between checkpoints; the last step is always saved.
        async_save: write checkpoints while training goes on, from a copy in host memory.
        keep: newest checkpoints that stay.
        keep_every: checkpoints of every so many steps stay for ever; 0: none.
        eval_every: steps between evaluations, of which the last step has one; 0: never.
        eval_bytes: held-out bytes read of each domain; None: all.
        sample_every: steps between texts written by the model, likewise; 0: never.
        log_every: steps between printed lines; ``metrics.jsonl`` has every step.
        log_load: write every expert's load into each line of ``metrics.jsonl``.
        init_from: a run or checkpoint folder whose weights the run begins with; an indexer that it
            lacks begins as initialised.
        only: patterns of the parameters that are trained (``*.indexer.*``); all others, and the
            routing biases, stay as they are. Empty: everything is trained.
    """

    steps: int
    lr: float = 1e-3
    seed: int = 0
    tokens_per_step: int = 8192
    micro_batch_size: int | None = None
    ramp_from_tokens: int | None = None
    ramp_steps: int = 0
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    min_lr_ratio: float = 0.1
    decay_share: float = 0.2
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    grad_clip: float = 1.0
    dtype: Precision = "float32"
    rounding: Rounding = "nearest"
    device: Device = "auto"
    compile: bool = False
    cuda_graph: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = False
    spike_sigmas: float = 6.0
    repeat_every: int = 0
    hang_seconds: float = 300.0
    save_every: int = 500
    async_save: bool = False
    keep: int = 2
    keep_every: int = 0
    eval_every: int = 500
    eval_bytes: int | None = None
    sample_every: int = 0
    log_every: int = 10
    log_load: bool = False
    init_from: str | None = None
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("steps", "tokens_per_step", "micro_batch_size", "ramp_from_tokens")
        require_positive(self, *counts, "save_every", "eval_bytes", "log_every")
        self._check_numbers()
        require(0 <= self.seed < 2**31, f"seed must be 0 to 2**31 - 1, got {self.seed}")
        require(
            self.keep >= 2,
            f"keep must be at least 2, got {self.keep}: a damaged checkpoint needs one before it",
        )
        require(
            0 <= self.warmup_steps <= self.steps,
            f"warmup_steps must be 0 to train.steps ({self.steps}), got {self.warmup_steps}",
        )
        require(
            self.deterministic or not self.repeat_every,
            f"repeat_every ({self.repeat_every}) needs train.deterministic=true: else a step may "
            "differ from itself without any fault",
        )
        require(
            self.rounding == "nearest" or (self.dtype, self.optimizer) == ("bf16", "adamw"),
            f"rounding={self.rounding} is of bf16 weights that AdamW updates: it needs "
            f"train.dtype=bf16 and train.optimizer=adamw, got {self.dtype} and {self.optimizer}",
        )
        self._check_ramp()

    def _check_numbers(self) -> None:
        for name in ("lr", "eps", "hang_seconds"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be above 0 and finite, got {value}")
        counts = ("eval_every", "sample_every", "repeat_every", "keep_every")
        for name in ("weight_decay", "grad_clip", "spike_sigmas", *counts):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be at least 0 and finite, got {value}")
        for name in ("min_lr_ratio", "decay_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is a share from 0 to 1, got {value}")
        means = (*(("betas", beta) for beta in self.betas), ("muon_momentum", self.muon_momentum))
        for name, value in means:
            require(0 <= value < 1, f"{name} must be at least 0 and below 1, got {value}")

    def _check_ramp(self) -> None:
        require(self.ramp_steps >= 0, f"ramp_steps must be at least 0, got {self.ramp_steps}")
        start = self.ramp_from_tokens
        require(
            (start is None) == (self.ramp_steps == 0),
            "a batch ramp needs both train.ramp_from_tokens and train.ramp_steps, "
            f"got {start} and {self.ramp_steps}",
        )
        require(
            start is None or start <= self.tokens_per_step,
            f"ramp_from_tokens is at most tokens_per_step ({self.tokens_per_step}), got {start}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run. A folder's ``config.toml`` is this, complete."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        longest = self.model.max_seq_len
        require(
            self.data.seq_len <= longest,
            f"data.seq_len ({self.data.seq_len}) must not be above model.max_seq_len ({longest})",
        )
        mtp = self.model.mtp
        require(
            mtp is None or mtp.n_mtp_modules < self.data.seq_len,
            "model.mtp.n_mtp_modules must be below data.seq_len: there is nothing that far ahead",
        )
        for name in ("tokens_per_step", "ramp_from_tokens"):
            self._check_rows(name)
        require(
            not self.train.cuda_graph or self.parallel.world == 1,
            "train.cuda_graph=true is for one process: exchanges between several are not recorded; "
            "leave it out",
        )
        self.parallel.check_model(self.model)

    def _check_rows(self, name: str) -> None:
        tokens, seq_len, micro = getattr(self.train, name), self.data.seq_len, self.micro_rows
        if tokens is None:
            return
        require(
            tokens % seq_len == 0,
            f"train.{name} ({tokens}) must be a multiple of data.seq_len ({seq_len}): "
            f"{_nearest_multiple(tokens, seq_len)} is",
        )
        require(
            micro is None or tokens // seq_len % micro == 0,
            f"train.{name} has {tokens // seq_len} rows of {seq_len} tokens, which "
            f"train.micro_batch_size ({micro}) does not divide",
        )
        world, rows = self.parallel.world, micro or tokens // seq_len
        field = name if micro is None else "micro_batch_size"
        require(
            rows % world == 0,
            f"train.{field} has {rows} rows of {seq_len} tokens, which {world} processes "
            "(parallel.dp * parallel.ep) cannot share equally: batch sizes are of all together",
        )

    @property
    def micro_rows(self) -> int | None:
        return self.train.micro_batch_size

    @property
    def rows_per_step(self) -> int:
        """Rows of a whole optimizer step, after any ramp."""
        return self.train.tokens_per_step // self.data.seq_len


def _nearest_multiple(value: int, unit: int) -> int:
    return max(round(value / unit), 1) * unit


def read_run_config(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A run from a TOML file or plain data, with ``key=value`` overrides on top.

    ``model.preset = "tiny-mla"`` stands for that preset's keys; the other model keys go over it,
    then the overrides.

    Raises:
        ConfigError: anything that cannot be, one sentence per problem; nothing has been written.
    """
    data = read_toml(source) if isinstance(source, Path) else source
    chosen = [item for item in overrides if _key(item) == "model.preset"]
    resolved = with_preset(override(data, chosen))
    return parse(RunConfig, override(resolved, (item for item in overrides if item not in chosen)))


def with_preset(data: Data) -> Data:
    """Plain data of a run, ``model.preset`` replaced by what it stands for."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return data
    own = {key: value for key, value in model.items() if key != "preset"}
    if not isinstance(model["preset"], str):
        raise ConfigError(f"model.preset must be a name, got {model['preset']!r}")
    return {**data, "model": merge(to_data(preset(model["preset"])), own)}


def _key(assignment: str) -> str:
    return assignment.partition("=")[0].strip().removeprefix("--")


# What may change when a run goes on: how far, how fast, how closely watched; not what is learnt.
FREE = (
    *(
        "steps",
        "micro_batch_size",
        "device",
        "compile",
        "cuda_graph",
        "activation_checkpointing",
        "deterministic",
    ),
    *("repeat_every", "hang_seconds", "async_save", "keep_every"),
    *("save_every", "keep", "eval_every", "eval_bytes", "sample_every", "log_every", "log_load"),
)


def identity(cfg: RunConfig) -> Data:
    """What makes a run this run: its config without the keys that may change when it goes on."""
    data = to_data(cfg)
    data["train"] = {key: value for key, value in data["train"].items() if key not in FREE}
    del data["data"]["workers"], data["parallel"]
    return data
