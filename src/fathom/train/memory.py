"""What to do when memory is out: where it went, by ``sizing/memory.py``, and what would fit.

The table is an estimate of what one micro-batch needs; the settings are tried on the same estimate,
with a tenth to spare.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fathom.sizing.memory import TrainingMemory, training_memory
from fathom.train.config import RunConfig
from fathom.train.schedule import rows_at

SPARE = 0.9  # of the memory is counted on


@contextmanager
def explained(cfg: RunConfig, device: torch.device) -> Iterator[None]:
    """Within it, running out of memory raises a ``RuntimeError`` that says what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "allocate memory" not in text:
            raise
        raise RuntimeError(advice(cfg, memory_of(device))) from error


def memory_of(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def advice(cfg: RunConfig, total: int) -> str:
    """The budget as a table, its largest part, and up to three settings that would fit."""
    parts = needed(cfg)
    largest = max(parts, key=lambda name: parts[name])
    rows = micro_rows(cfg)
    head = (
        f"out of memory: a micro-batch of {rows} x {cfg.data.seq_len} tokens needs about "
        f"{_gb(sum(parts.values()))}, and there are {_gb(total)}"
    )
    table = [
        f"  {name:<12} {_gb(size):>10}" + ("  the largest" if name == largest else "")
        for name, size in parts.items()
    ]
    found = [
        f"  {setting} (about {_gb(size)})"
        for setting, size in alternatives(cfg)
        if size < SPARE * total
    ][:3]
    end = ["these would fit:", *found] if found else ["a smaller model, or more GPUs, would fit"]
    return "\n".join([head, *table, *end])


def needed(cfg: RunConfig) -> dict[str, int]:
    """Bytes of each part."""
    parts: TrainingMemory = training_memory(cfg.model, micro_rows(cfg) * cfg.data.seq_len)
    found = {name: int(size) for name, size in parts.items() if isinstance(size, int)}
    if cfg.train.activation_checkpointing:  # every block's input, and one block whole
        tokens, layers = micro_rows(cfg) * cfg.data.seq_len, cfg.model.n_layers
        inputs = 4 * layers * cfg.model.dim * tokens
        found["activations"] = min(found["activations"], inputs + found["activations"] // layers)
    if cfg.train.dtype == "bf16":
        for name in ("weights", "gradients", "optimizer"):
            found[name] //= 2
    if cfg.train.rounding == "master":
        found["optimizer"] += found["weights"]  # 16 bits more of each
    return found


def alternatives(cfg: RunConfig) -> Iterator[tuple[str, int]]:
    """Settings that need less, the mildest first of each kind, and what they need."""
    train = cfg.train
    smaller = [rows for rows in _divisors(micro_rows(cfg)) if rows < micro_rows(cfg)]
    for rows in reversed(smaller):
        other = replace(cfg, train=replace(train, micro_batch_size=rows))
        yield f"train.micro_batch_size={rows}", sum(needed(other).values())
        if sum(needed(other).values()) < sum(needed(cfg).values()) / 2:
            break
    if not train.activation_checkpointing:
        other = replace(cfg, train=replace(train, activation_checkpointing=True))
        yield "train.activation_checkpointing=true", sum(needed(other).values())
        if smaller:
            other = replace(other, train=replace(other.train, micro_batch_size=1))
            both = "train.activation_checkpointing=true train.micro_batch_size=1"
            yield both, sum(needed(other).values())
    if train.dtype != "bf16":
        other = replace(cfg, train=replace(train, dtype="bf16", micro_batch_size=1))
        yield "train.dtype=bf16 train.micro_batch_size=1", sum(needed(other).values())


def micro_rows(cfg: RunConfig) -> int:
    """Rows that one process has in memory at a time."""
    rows = cfg.train.micro_batch_size or rows_at(cfg, cfg.train.steps)
    return max(rows // cfg.parallel.world, 1)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
