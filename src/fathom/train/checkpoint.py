"""Saving and resuming everything that the next step depends on.

``convert/run_folder.py`` says how a checkpoint gets onto the disk; here is what is in it: weights,
optimizer state, random state, the position in the data, and the counters of the guards. A run that
is stopped and resumed, however often, is the run that never stopped, bit by bit.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fathom.convert.parts import Part
from fathom.convert.ranks import Ranks
from fathom.convert.run_folder import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    check_shapes,
    checkpoint_path,
    copy_tensors,
    find_checkpoint,
    new_checkpoint,
    newest,
    prune,
    read_json,
    read_tokenizer,
    step_of,
    sweep,
    tensor_shapes,
    write_json,
    write_tensors,
    write_texts,
)
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder
from fathom.settings import ConfigError, Data, to_toml
from fathom.train.changes import check_same_run
from fathom.train.config import RunConfig, identity
from fathom.train.guards import SPAN, SpikeGuard
from fathom.train.optim import Optimizer

Place = Callable[[str, Tensor], Tensor | Part]
Tensors = dict[str, Tensor | Part]


@dataclass
class Progress:
    """Where a run is.

    Args:
        step: optimizer steps done (skipped ones included).
        tokens: tokens read.
        skipped: steps in a row, up to now, whose loss or gradients were not finite.
        skipped_in_all: all such steps.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_all: int = 0


@dataclass
class Parts:
    """What a checkpoint is made of, besides the config and the tokenizer."""

    model: Decoder
    optimizer: Optimizer
    guard: SpikeGuard
    progress: Progress = field(default_factory=Progress)
    loader: dict[str, Any] = field(default_factory=dict)  # the loader's position
    place: Place | None = None  # of several ranks: where a tensor lies in its whole

    def model_tensors(self) -> Tensors:
        """The live weights and buffers by name, each with its place."""
        return self._placed(self.model.state_dict())

    def optimizer_tensors(self) -> Tensors:
        """The live state of the optimizer, likewise."""
        return self._placed(self.optimizer.state())

    def _placed(self, tensors: Mapping[str, Tensor]) -> Tensors:
        place = self.place or (lambda _, tensor: tensor)
        return {name: place(name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Snapshot:
    """All that one checkpoint will hold. Its tensors are live, unless somebody copied them."""

    step: int
    model: Tensors
    optimizer: Tensors
    state: Data
    config: RunConfig
    tokenizer: Tokenizer

    @property
    def num_bytes(self) -> int:
        """Of all tensors, of all ranks."""
        return sum(map(_num_bytes, [*self.model.values(), *self.optimizer.values()]))


def _num_bytes(item: Tensor | Part) -> int:
    tensor = item.tensor if isinstance(item, Part) else item
    return math.prod(item.shape) * tensor.element_size()


def snapshot(cfg: RunConfig, parts: Parts, tokenizer: Tokenizer) -> Snapshot:
    """The present state of a run."""
    state = {
        **asdict(parts.progress),
        "guard": parts.guard.state(),
        "loader": parts.loader,
        "rng": random_state(parts.model.embed.weight.device),
        "config_sha256": _sha256(json.dumps(identity(cfg), sort_keys=True).encode()),
        "tokenizer_sha256": _sha256(tokenizer.to_bytes()),
    }
    tensors = parts.model_tensors(), parts.optimizer_tensors()
    return Snapshot(parts.progress.step, *tensors, state, cfg, tokenizer)


def save(run: Path, taken: Snapshot, ranks: Ranks | None = None) -> Path:
    """Commit a checkpoint, then remove the oldest beyond ``train.keep`` that nothing may need.

    Every one of ``ranks`` calls it; all return or all raise.

    Raises:
        OSError: the disk is full or fails; earlier checkpoints are untouched.
    """
    ranks = ranks or Ranks()
    final = checkpoint_path(run, taken.step)
    who = {"rank": ranks.rank, "ranks": ranks.size}
    try:
        with new_checkpoint(final, ranks) as folder:
            write_tensors(folder / MODEL, taken.model, **who)
            write_tensors(folder / OPTIMIZER, taken.optimizer, **who)
            if ranks.rank == 0:
                write_texts(folder, taken.tokenizer, to_toml(taken.config))
                write_json(folder / STATE, taken.state)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise OSError(
            f"cannot save the checkpoint {final} ({taken.num_bytes:,} bytes): "
            f"{reason or error}; the checkpoints before it are untouched"
        ) from error
    if ranks.rank == 0:
        cfg = taken.config.train
        spikes = (at for at in taken.state["guard"]["spikes"] if at > taken.step - SPAN)
        prune(run, cfg.keep, cfg.keep_every, needed_before=min(spikes, default=None))
    return final


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def restore(folder: Path, parts: Parts) -> None:
    """Fill ``parts`` and torch's generators from a checked checkpoint.

    Raises:
        CheckpointError: it does not fit.
    """
    state = read_json(folder / STATE)
    copy_tensors(folder / MODEL, parts.model_tensors())
    copy_tensors(folder / OPTIMIZER, parts.optimizer_tensors())
    try:
        parts.progress = Progress(**{name: int(state[name]) for name in asdict(Progress())})
        parts.loader = state["loader"]
        if "guard" in state:  # the first checkpoints of this format had none
            parts.guard.restore(state["guard"])
        set_random_state(state["rng"], parts.model.embed.weight.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be used: {error!r}") from None


def starting_point(
    run: Path,
    cfg: RunConfig,
    warn: Callable[[str], None],
    *,
    strict: bool = False,
    allow_change: Sequence[str] = (),
) -> Path | None:
    """The checkpoint from which ``cfg`` goes on in a run folder; None: it begins.

    Leftovers of an interrupted save are removed. ``warn`` is told of damaged checkpoints and of
    every key that has changed.

    Args:
        strict: a damaged checkpoint is an error, and none before it is taken.
        allow_change: see :func:`fathom.train.changes.check_same_run`.

    Raises:
        ConfigError: the folder's run is another one, or has gone further than ``train.steps``.
        CheckpointError: there are checkpoints, but all are damaged (``strict``: the newest is).
    """
    sweep(run)
    folder = newest(run, warn=_refuse if strict else warn)
    if folder is not None or (run / CONFIG).exists():
        for change in check_same_run(folder or run, cfg, allow_change):
            warn(f"going on with a change: {change}")
    if folder is not None and step_of(folder) > cfg.train.steps:
        raise ConfigError(
            f"train.steps is {cfg.train.steps} and {run} has done {step_of(folder)}: "
            "raise it, or name another folder with --out"
        )
    return folder


def _refuse(sentence: str) -> None:
    problem = sentence.partition(": going back")[0]
    raise CheckpointError(f"{problem}; without --strict the checkpoint before it is taken")


def init_from(path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Begin with the weights of a run or checkpoint folder; an indexer it lacks stays as it is.

    Raises:
        CheckpointError: its tokenizer or its shapes are not this run's.
    """
    folder = find_checkpoint(path)
    theirs, ours = _sha256(read_tokenizer(folder).to_bytes()), _sha256(tokenizer.to_bytes())
    if theirs != ours:
        raise CheckpointError(
            f"train.init_from={path} was trained with tokenizer {theirs[:12]} and this run's data "
            f"has tokenizer {ours[:12]}: the same ids would mean other text"
        )
    state, shapes = model.state_dict(), tensor_shapes(folder / MODEL)
    new = {name for name in state.keys() - shapes.keys() if ".indexer." in name}
    needed = {**shapes, **{name: tuple(state[name].shape) for name in new}}
    check_shapes(model.cfg, needed, folder)
    copy_tensors(folder / MODEL, {name: t for name, t in state.items() if name not in new})


def random_state(device: torch.device) -> dict[str, str]:
    """The state of torch's generators that a run may draw from, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()
    }


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Undo :func:`random_state`; a kind of device that the state lacks keeps its own."""
    tensors = {name: _byte_tensor(text) for name, text in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _byte_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
