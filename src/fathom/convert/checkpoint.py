"""A checkpoint of another project, opened: what it says it is, and whether its tensors agree.

Opening reads configs and headers alone. ``check`` compares every name, shape and type with the
config before any memory is taken, so a small file cannot ask for a large model.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.convert.families import Family, family_of, may_be_left_out, read_config
from fathom.convert.files import exists, read_bytes, read_object
from fathom.convert.fp8 import Dequantised, check_quantization
from fathom.convert.hf_config import HFConfig
from fathom.convert.hf_tokenizer import made_files
from fathom.convert.llama import llama_rules
from fathom.convert.names import Ranks, Renamed, rank_files, to_hugging_face, without_prefix
from fathom.convert.official import deepseek_config, is_deepseek, meta_config
from fathom.convert.rules import Copy, Rule, filled_by
from fathom.convert.run_folder import CONFIG, CheckpointError
from fathom.convert.source import FolderSource, TensorSource
from fathom.ffn import MoEConfig
from fathom.model import Decoder

HF_CONFIG, META_CONFIG, META_WEIGHTS = "config.json", "params.json", "consolidated.safetensors"
TEXT_PREFIX = "language_model."  # of the words' part in a model of words and images
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE-MODEL",
    "NOTICE",
)
MAX_SIDE_BYTES = 128 * 2**20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Origin:
    """What came with a model beside its weights, to be written again with it.

    Args:
        config: its ``config.json``; empty where it had none.
        files: tokenizer, generation defaults, card and licence: name to content.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another project.

    Args:
        path: where it lies, for messages.
        cfg: the model.
        rules: between its tensors and ours.
        source: its tensors, under the names of the rules.
        origin: what else came with it.
        family: of Hugging Face; None: another project's layout.
    """

    path: Path
    cfg: ModelConfig
    rules: list[Rule]
    source: TensorSource
    origin: Origin
    family: Family | None = None


def is_foreign(path: Path) -> bool:
    """Whether a folder is another project's checkpoint, and not one of ours."""
    theirs = exists(path, HF_CONFIG) or exists(path, META_CONFIG)
    return theirs and not exists(path, CONFIG)


def read_folder_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder, or what it would be for DeepSeek's or Meta's own files.

    Of a model of words and images it is the part for words.

    Raises:
        CheckpointError: there is none, or a key that is not followed.
    """
    if not exists(folder, HF_CONFIG):
        return meta_config(read_object(folder, META_CONFIG), f"{folder / META_CONFIG}")
    data, source = read_object(folder, HF_CONFIG), f"{folder / HF_CONFIG}"
    if is_deepseek(data):
        return deepseek_config(data, source)
    words = data.get("text_config")
    for part in (data, words):
        if isinstance(part, dict):
            check_quantization(part.get("quantization_config"), source)
    return words if isinstance(words, dict) and "hidden_size" not in data else data


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of Hugging Face's, DeepSeek's or Meta's.

    Raises:
        CheckpointError: what cannot be used, by file, key or tensor.
    """
    config = read_folder_config(folder)
    source = f"{folder / HF_CONFIG}"
    cfg = read_config(config, source)
    origin = Origin(config, read_side_files(folder))
    if not exists(folder, HF_CONFIG):
        tensors = Renamed(FolderSource(folder, [META_WEIGHTS]), to_hugging_face)
        require_as_many(cfg, tensors, folder)
        return Checkpoint(folder, cfg, llama_rules(cfg, interleaved=True), tensors, origin)
    tensors = _open_tensors(folder)
    require_as_many(cfg, tensors, folder)
    family = family_of(HFConfig(config, source))
    lowest = f"model.layers.{cfg.n_layers}."
    if cfg.mtp is not None and not any(name.startswith(lowest) for name in tensors.entries):
        cfg = replace(cfg, mtp=None)  # configs promise an MTP layer that transformers did not save
        origin = Origin({**config, "num_nextn_predict_layers": 0}, origin.files)
    return Checkpoint(folder, cfg, family.rules(cfg, config), tensors, origin, family)


def _open_tensors(folder: Path) -> TensorSource:
    if ranks := rank_files(os.listdir(folder)):
        sources = [FolderSource(folder, [name]) for name in ranks]
        return Renamed(sources[0] if len(sources) == 1 else Ranks(sources), to_hugging_face)
    source = FolderSource(folder)
    if not any(name.startswith("model.") for name in source.entries):
        if any(name.startswith(TEXT_PREFIX) for name in source.entries):
            return without_prefix(source, TEXT_PREFIX)
        return Renamed(source, to_hugging_face)
    return source


def read_side_files(folder: Path) -> dict[str, bytes]:
    """The small files that belong to a model, and a ``tokenizer.json`` where it can be made."""
    found = _side_files(folder)
    with suppress(CheckpointError):  # it is raised again, once words are asked for
        found |= made_files(found, f"{folder}")
    return found


def _side_files(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in SIDE_FILES:
        if exists(folder, name):
            left = MAX_SIDE_BYTES - sum(map(len, found.values()))
            found[name] = read_bytes(folder, name, left)
    return found


def check(checkpoint: Checkpoint) -> dict[str, tuple[Rule, Tensor]]:
    """Compare the tensors with the config: every name, shape and type.

    Returns:
        For each of their names the rule and the part of ours, a tensor without memory.

    Raises:
        CheckpointError: the first tensor that is missing, surplus, or of another shape or type.
    """
    cfg, path = checkpoint.cfg, checkpoint.path
    entries = Dequantised(checkpoint.source).entries
    needed = layout(cfg, checkpoint.rules)
    family = checkpoint.family
    missing = [n for n, (rule, _) in needed.items() if n not in entries and type(rule) is not Copy]
    surplus = [
        name
        for name in entries
        if name not in needed and not (family and may_be_left_out(name, cfg, family))
    ]
    if missing:
        raise CheckpointError(_sentence(f"{path} lacks", missing, "its config asks for"))
    if surplus:
        raise CheckpointError(_sentence(f"{path} holds", surplus, "its config does not ask for"))
    for name, (_, part) in needed.items():
        entry = entries.get(name)
        if entry is not None and (entry.shape != part.shape or entry.dtype not in FLOATS):
            raise CheckpointError(
                f"{path} does not fit its config: {name!r} is {list(entry.shape)} of "
                f"{str(entry.dtype).removeprefix('torch.')}, and must be {list(part.shape)} of "
                "floating-point numbers"
            )
    return needed


def layout(cfg: ModelConfig, rules: list[Rule]) -> dict[str, tuple[Rule, Tensor]]:
    """Their names, each with its rule and an empty tensor of its shape."""
    with torch.device("meta"):
        return filled_by(rules, Decoder(cfg).state_dict())


def require_as_many(cfg: ModelConfig, source: TensorSource, path: Path) -> None:
    """Refuse a config of more tensors than there are, before their names are made.

    Raises:
        CheckpointError: with both numbers.
    """
    ffns = [group.ffn for group in cfg.layers()]
    experts = sum(ffn.n_routed_experts for ffn in ffns if isinstance(ffn, MoEConfig))
    at_least = 7 * cfg.n_layers + 3 * experts
    if at_least > len(source.entries):
        raise CheckpointError(
            f"{path} holds {len(source.entries):,} tensors, and its config asks for at least "
            f"{at_least:,}"
        )


def _sentence(verb: str, names: list[str], why: str) -> str:
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{verb} the tensor {names[0][:200]!r}{more}, which {why}"
