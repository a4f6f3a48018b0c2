"""Saving and resuming everything that the next step depends on, and guarding the run folder.

``convert/run_folder.py`` says how a checkpoint gets onto the disk; here is what is in it: weights,
optimizer state, random state, the position in the data, and the counters of the guards. A run that
is stopped and resumed, however often, is the run that never stopped, bit by bit.
"""

import base64
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.convert.parts import Part
from fathom.convert.ranks import Ranks
from fathom.convert.run_folder import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    check_shapes,
    checkpoint_path,
    committed,
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
from fathom.settings import ConfigError, Data, parse, read_toml, to_toml
from fathom.train.config import RunConfig, identity
from fathom.train.optim import Optimizer

try:
    import fcntl
except ImportError:  # Windows has no flock: a second run is not noticed there
    fcntl = None

Place = Callable[[str, Tensor], Tensor | Part]
OURS = (CONFIG, "env.json", "metrics.jsonl", "eval.jsonl", CHECKPOINTS)


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
    progress: Progress = field(default_factory=Progress)
    loader: dict[str, Any] = field(default_factory=dict)  # the loader's position
    place: Place | None = None  # of several ranks: where a tensor lies in its whole

    def model_tensors(self) -> dict[str, Tensor | Part]:
        """The live weights and buffers by name, each with its place."""
        return self._placed(self.model.state_dict())

    def optimizer_tensors(self) -> dict[str, Tensor | Part]:
        """The live state of the optimizer, likewise."""
        return self._placed(self.optimizer.state())

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Part]:
        place = self.place or (lambda _, tensor: tensor)
        return {name: place(name, tensor) for name, tensor in tensors.items()}


def save(
    run: Path, cfg: RunConfig, parts: Parts, tokenizer: Tokenizer, ranks: Ranks | None = None
) -> Path:
    """Commit a checkpoint of the present step, then remove the oldest beyond ``train.keep``.

    Every one of ``ranks`` calls it; all return or all raise.

    Raises:
        OSError: the disk is full or fails; earlier checkpoints are untouched.
    """
    ranks = ranks or Ranks()
    final = checkpoint_path(run, parts.progress.step)
    who = {"rank": ranks.rank, "ranks": ranks.size}
    try:
        with new_checkpoint(final, ranks) as folder:
            write_tensors(folder / MODEL, parts.model_tensors(), **who)
            write_tensors(folder / OPTIMIZER, parts.optimizer_tensors(), **who)
            if ranks.rank == 0:
                write_texts(folder, tokenizer, to_toml(cfg))
                write_json(folder / STATE, _state(cfg, parts, tokenizer))
    except OSError as error:
        raise OSError(
            f"cannot save the checkpoint {final} (about {num_bytes(parts) / 1e6:,.0f} MB): "
            f"{error.strerror or error}; the checkpoints before it are untouched"
        ) from error
    if ranks.rank == 0:
        prune(run, cfg.train.keep)
    return final


def _state(cfg: RunConfig, parts: Parts, tokenizer: Tokenizer) -> Data:
    return {
        **asdict(parts.progress),
        "loader": parts.loader,
        "rng": random_state(parts.model.embed.weight.device),
        "config_sha256": _sha256(json.dumps(identity(cfg), sort_keys=True).encode()),
        "tokenizer_sha256": _sha256(tokenizer.to_bytes()),
    }


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
        set_random_state(state["rng"], parts.model.embed.weight.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be used: {error!r}") from None


def starting_point(run: Path, cfg: RunConfig, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint from which ``cfg`` goes on in a run folder; None: it begins.

    Leftovers of an interrupted save are removed. ``warn`` is told of damaged checkpoints.

    Raises:
        ConfigError: the folder's run is another one, or has gone further than ``train.steps``.
        CheckpointError: there are checkpoints, but all are damaged.
    """
    sweep(run)
    folder = newest(run, warn=warn)
    if folder is not None or (run / CONFIG).exists():
        check_same_run(folder or run, cfg)
    if folder is not None and step_of(folder) > cfg.train.steps:
        raise ConfigError(
            f"train.steps is {cfg.train.steps} and {run} has done {step_of(folder)}: "
            "raise it, or name another folder with --out"
        )
    return folder


def check_same_run(folder: Path, cfg: RunConfig) -> None:
    """Refuse to go on with another model, other data or another recipe than the folder's.

    Raises:
        ConfigError: the first keys that differ, with both values.
    """
    theirs, ours = _flat(identity(read_config(folder))), _flat(identity(cfg))
    keys = sorted(theirs.keys() | ours.keys())
    differs = [key for key in keys if theirs.get(key) != ours.get(key)]
    if differs:
        shown = ", ".join(
            f"{key} was {theirs.get(key, 'none')} and is {ours.get(key, 'none')}"
            for key in differs[:4]
        )
        more = f", and {len(differs) - 4} more" if len(differs) > 4 else ""
        raise ConfigError(
            f"{folder} is of another run: {shown}{more}; "
            "name another folder with --out, or put the config back"
        )


def read_config(folder: Path) -> RunConfig:
    """The config of a run or checkpoint folder."""
    try:
        return parse(RunConfig, read_toml(folder / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {error}") from None


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, list):
        data = {str(index): item for index, item in enumerate(data)}
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    return {k: v for key, item in data.items() for k, v in _flat(item, f"{prefix}{key}.").items()}


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


def num_bytes(parts: Parts) -> int:
    """Bytes of the tensors of one checkpoint."""
    items = [*parts.model_tensors().values(), *parts.optimizer_tensors().values()]
    return sum(
        math.prod(item.shape) * (item.tensor if isinstance(item, Part) else item).itemsize
        for item in items
    )


def check_disk(run: Path, needed: int, keep: int) -> str | None:
    """Whether checkpoints of ``needed`` bytes will fit: a sentence if room is short, else None.

    Raises:
        OSError: not one more fits.
    """
    free = shutil.disk_usage(run).free
    room = f"{run} has {free / 1e6:,.0f} MB free and a checkpoint takes {needed / 1e6:,.0f} MB"
    if free < 1.05 * needed:
        raise OSError(f"{room}: make room, or name another folder with --out")
    to_come = keep + 1 - len(committed(run))  # a new one is written before the oldest goes
    if free < to_come * needed:
        return f"{room}, of which {to_come} more will lie there (train.keep={keep} and the next)"
    return None


def check_folder(run: Path) -> None:
    """Refuse a folder that holds results but no config: whose they are cannot be known.

    Raises:
        ValueError: with the file that is there.
    """
    found = [name for name in OURS if (run / name).exists()]
    if found and CONFIG not in found:
        raise ValueError(f"{run} holds {found[0]} but no {CONFIG}: name another folder with --out")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder, which is made if it is not there, against a second run.

    Raises:
        ValueError: another process trains in it, or it cannot be written.
    """
    lock = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"the run folder {run} cannot be written: {error.strerror}") from None
    try:
        _flock(handle, run)
        yield
    finally:
        if [path.name for path in run.iterdir()] == [lock.name]:  # refused: leave nothing behind
            lock.unlink()
            run.rmdir()
        os.close(handle)


def _flock(handle: int, run: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is training in {run}: wait for it, or name another folder with --out"
        ) from None
