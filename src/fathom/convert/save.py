"""A model as a Hugging Face folder: what transformers, vLLM and SGLang read.

Everything is streamed: a source of tensors under their names, wrapped to change the type, is
written shard by shard. A Hugging Face folder is itself such a source, so a folder is converted
without a model in memory, and without a change to what is not asked to change.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import processors
from torch import Tensor

from fathom.config import ModelConfig
from fathom.convert.card import model_card
from fathom.convert.checkpoint import HF_CONFIG, Checkpoint, Origin, check
from fathom.convert.families import family_of, read_config, write_config
from fathom.convert.fp8 import E4M3, QUANTIZATION, SCALE, Dequantised, Quantised
from fathom.convert.hf_config import HFConfig, respelled
from fathom.convert.rules import Copy, Rule, filled_by
from fathom.convert.run_folder import new_folder, require_free
from fathom.convert.source import DTYPES as SAFETENSORS_DTYPES
from fathom.convert.source import INDEX, SINGLE, Entry, Progress, TensorSource
from fathom.data.shards import sync
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder
from fathom.settings import ConfigError

SHARD_BYTES = 5 * 10**9
MARGIN_BYTES = 2**20
DTYPES = ("float32", "bfloat16", "float16", "fp8")
EMBEDDING = "model.embed_tokens.weight"
BIAS = "e_score_correction_bias"  # float32 in every release, whatever the weights are
LABELS = {dtype: label for label, dtype in SAFETENSORS_DTYPES.items()}


class ModelSource(TensorSource):
    """A model's tensors under another project's names."""

    def __init__(self, parts: Mapping[str, tuple[Rule, Tensor]]) -> None:
        self._parts = {
            name: (rule, part)
            for name, (rule, part) in parts.items()
            if not isinstance(rule, Copy) or rule.written
        }
        self._entries = {
            name: Entry(tuple(part.shape), part.dtype, part.nbytes)
            for name, (_, part) in self._parts.items()
        }

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        rule, part = self._parts[name]
        return rule.save(part.cpu())


class Cast(TensorSource):
    """A source in another floating-point type; FP8, its scales and routing biases stay."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self._entries = {name: self._entry(name, e) for name, e in source.entries.items()}

    def _entry(self, name: str, entry: Entry) -> Entry:
        kept = entry.dtype == E4M3 or name.endswith((SCALE, BIAS))
        if kept or not entry.dtype.is_floating_point:
            return entry
        count = torch.Size(entry.shape).numel()
        return Entry(entry.shape, self._dtype, count * self._dtype.itemsize)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._entries[name].dtype)

    def release(self, name: str) -> None:
        self._source.release(name)


@dataclass(frozen=True)
class Export:
    """What is to be written: tensors under Hugging Face's names, and what lies beside them."""

    cfg: ModelConfig
    source: TensorSource
    config: Mapping[str, Any]
    files: Mapping[str, bytes]


def of_model(model: Decoder, tokenizer: Tokenizer | None) -> Export:
    """A model, with what came with it: its ``config.json``, tokenizer, card.

    Args:
        tokenizer: instead of the one that came with it.

    Raises:
        ValueError: no family of Hugging Face has such a model.
    """
    origin = getattr(model, "origin", None) or Origin()
    cfg, state, config = model.cfg, model.state_dict(), dict(origin.config)
    if not config or read_config(config, HF_CONFIG) != cfg:
        config = write_config(cfg)
        cfg = read_config(config, HF_CONFIG)
        state = with_biases(cfg, state)
    family = family_of(HFConfig(config, HF_CONFIG))
    files = dict(origin.files)
    if tokenizer is not None:
        files |= tokenizer_files(tokenizer, cfg.max_seq_len)
    words = tokenizer or getattr(model, "tokenizer", None)
    if words is not None and not {"bos_token_id", "eos_token_id"} & config.keys():
        config |= {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
    return Export(cfg, ModelSource(filled_by(family.rules(cfg, config), state)), config, files)


def with_biases(cfg: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state, with zeros for the routing biases that V3 has and the model has not."""
    with torch.device("meta"):
        needed = Decoder(cfg).state_dict()
    absent = {name: torch.zeros(t.shape) for name, t in needed.items() if name not in state}
    assert all(name.endswith("router.expert_bias") for name in absent)
    return {**state, **absent}


def of_folder(checkpoint: Checkpoint) -> Export:
    """A Hugging Face folder, with no model in memory: every tensor as it is, FP8 too.

    Raises:
        CheckpointError: its tensors are not those that its config asks for.
    """
    check(checkpoint)
    origin = checkpoint.origin
    return Export(checkpoint.cfg, checkpoint.source, origin.config, origin.files)


def write_hf(
    export: Export,
    out: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a Hugging Face folder, which is there whole or not at all.

    Args:
        dtype: one of ``DTYPES``; None: every tensor as it is.
        force: replace the checkpoint at ``out``.

    Raises:
        ValueError: ``out`` is there already, or there is no room for it.
    """
    source = in_dtype(export.source, dtype)
    files = {"README.md": model_card(export.cfg, source).encode(), **export.files}
    files[HF_CONFIG] = to_json(final_config(export.config, source))
    shards = plan(source)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(entry.num_bytes for entry in source.entries.values())
        files[INDEX] = to_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    require_free(out, force=force)
    require_room(out, source, files)
    with new_folder(out) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        report = counter(f"writing {out.name}", source, progress)
        for file, names in shards.items():
            write_safetensors(folder / file, source, names, report)
        for path in folder.iterdir():
            sync(path)
        sync(folder)


def in_dtype(source: TensorSource, dtype: str | None) -> TensorSource:
    """The tensors as they are to be stored."""
    if dtype is None:
        return source
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "fp8":
        return Cast(Quantised(source), torch.bfloat16)
    return Cast(Dequantised(source), getattr(torch, dtype))


def final_config(config: Mapping[str, Any], source: TensorSource) -> dict[str, Any]:
    """The ``config.json`` of tensors of these types, as v4 and v5 of transformers read it."""
    stored = str(source.entries[EMBEDDING].dtype).removeprefix("torch.")
    written = respelled(config, stored)
    if config.get("model_type") == "kimi_k2":  # V3 under a name that only its own code knows
        written["model_type"] = "deepseek_v3"
    if not any(entry.dtype == E4M3 for entry in source.entries.values()):
        written.pop("quantization_config", None)
    else:
        written.setdefault("quantization_config", QUANTIZATION)
    return written


def to_json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def plan(source: TensorSource) -> dict[str, list[str]]:
    """Which file holds which tensors: as many to a file as fit in ``SHARD_BYTES``."""
    groups: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, entry in source.entries.items():
        if entry.num_bytes > room and groups[-1]:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= entry.num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def require_room(out: Path, source: TensorSource, files: Mapping[str, bytes]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ConfigError: with both numbers.
    """
    needed = sum(entry.num_bytes for entry in source.entries.values()) + MARGIN_BYTES
    needed += sum(map(len, files.values()))
    parent = next(path for path in out.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(
            f"{out} would take {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB left"
        )


def counter(stage: str, source: TensorSource, progress: Progress | None) -> Callable[[int], None]:
    """Adds up bytes and tells ``progress``."""
    total, done = sum(entry.num_bytes for entry in source.entries.values()), 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(stage, done, total)

    return report


def write_safetensors(
    path: Path, source: TensorSource, names: Sequence[str], report: Callable[[int], None]
) -> None:
    """One file, tensor by tensor: wide types first, so that every tensor is aligned."""
    entries = source.entries
    names = sorted(names, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        entry = entries[name]
        span = [position, position + entry.num_bytes]
        label = LABELS[entry.dtype]
        header[name] = {"dtype": label, "shape": entry.shape, "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = source.read(name).contiguous()
            assert tensor.dtype == entries[name].dtype
            assert tuple(tensor.shape) == entries[name].shape
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            source.release(name)
            report(entries[name].num_bytes)


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, bytes]:
    """What transformers needs for a tokenizer of ours: begin-of-text before every text."""
    bos, eos = tokenizer.token_name(tokenizer.bos_id), tokenizer.token_name(tokenizer.eos_id)
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": to_json(described),
        "generation_config.json": to_json(generation),
    }
