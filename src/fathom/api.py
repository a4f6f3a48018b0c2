"""The public functions: build, load and save a model, size a config, add a part of one's own."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch

from fathom import sizing
from fathom.attention import ATTENTION, AttentionConfig
from fathom.config import ModelConfig
from fathom.convert.checkpoint import (
    HF_CONFIG,
    is_foreign,
    open_checkpoint,
    read_folder_config,
)
from fathom.convert.families import read_config
from fathom.convert.fetch import located
from fathom.convert.gguf import is_gguf, open_gguf
from fathom.convert.gguf_save import Kind, write_gguf
from fathom.convert.load import load_foreign
from fathom.convert.run_folder import CONFIG, CheckpointError, load_model, save_model
from fathom.convert.save import DTYPES as SAVED
from fathom.convert.save import of_folder, of_model, write_hf
from fathom.convert.source import PICKLES, Progress
from fathom.data.tokenizer import Tokenizer
from fathom.ffn import FFNS, FFNConfig
from fathom.generate.engine import tokenizer_of
from fathom.layers.base import Config, require
from fathom.model import Decoder, build_model
from fathom.presets import PRESETS, preset
from fathom.settings import ConfigError, override, parse, read_toml, refresh, to_data
from fathom.train.config import with_preset

C = TypeVar("C", bound=Config)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
FORMATS = ("fathom", "hf", "gguf")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def build(
    model: str | Path | ModelConfig,
    *assignments: str,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    **changes: object,
) -> Decoder:
    """A model with random weights.

    ``fathom.build("deepseek-v2-lite", "groups.0.count=2", vocab_size=4096)``

    Args:
        model: a preset, a config, or the path of a TOML file, a run or a checkpoint folder (for its
            config).
        assignments: ``key=value`` overrides with dotted keys, as on the command line.
        seed: of the weights.
        device: where the weights lie; ``meta``: shapes alone, for models of any size.
        changes: top-level keys of :class:`ModelConfig`.

    Raises:
        ConfigError: no such model, or an override that cannot be.
    """
    cfg = resolve(model, assignments, changes)
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return Decoder(cfg).to(as_dtype(dtype))
    return build_model(cfg, seed=seed, device=device, dtype=as_dtype(dtype))


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Decoder:
    """The model of a run folder (its newest whole checkpoint), a checkpoint, or a fetched name.

    Ours, or Hugging Face's of Llama, DeepSeek V1, V2, V3, R1, Moonlight, Kimi-K2, or a GGUF file
    of a Llama. The tokenizer comes along as ``model.tokenizer``, where :class:`Engine` and ``save``
    find it.

    Args:
        dtype: of the weights; None: as stored (bfloat16 where they are FP8).
        progress: told of another project's checkpoint: stage, bytes read, bytes in all.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a kind that is not read.
    """
    if str(path) in PRESETS and not Path(path).exists():
        raise CheckpointError(f"{path} is a preset, which has no weights: use fathom.build")
    path = located(path)
    _refuse_pickles(path)
    wanted = None if dtype is None else as_dtype(dtype)
    if is_foreign(path) or is_gguf(path):
        return load_foreign(path, device=device, dtype=wanted, progress=progress)
    model, tokenizer = load_model(path, device=device, dtype=wanted)
    object.__setattr__(model, "tokenizer", tokenizer)  # nn.Module types its own setter narrowly
    return model


def save(
    model: Decoder,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    format: Literal["fathom", "hf", "gguf"] = "fathom",
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a model as a new folder, or a Llama, DeepSeek-V2 or V3 as a GGUF file.

    Args:
        tokenizer: None: the one that came with the model, or the bundled one of its size.
        format: ``fathom``: what ``load`` reads; ``hf``: what transformers, vLLM and SGLang read
            too; ``gguf``: what llama.cpp reads too.
        dtype: with ``hf``: float32, bfloat16, float16 or fp8; None: as the model is. With
            ``gguf``: float16 or q8_0; None: float16.
        force: replace a checkpoint that is at ``out``.
        progress: with ``hf`` and ``gguf``: told of the stage, the bytes written, the bytes in all.

    Raises:
        ValueError: ``out`` is there already, no tokenizer is known, or Hugging Face's families have
            no such model.
    """
    require(format in FORMATS, f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format != "fathom":
        if tokenizer is None and getattr(model, "origin", None) is None:
            tokenizer = tokenizer_of(model)
        export = of_model(model, tokenizer)
        if format == "gguf":
            kind = _gguf_kind(dtype)
            write_gguf(export, Path(out), kind=kind, force=force, progress=progress)
        else:
            write_hf(export, Path(out), dtype=dtype, force=force, progress=progress)
        return
    require(dtype is None, "dtype goes with format='hf': load the model in the dtype you want")
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise ValueError(
            f"no tokenizer of {model.cfg.vocab_size} ids came with this model: pass tokenizer="
        )
    save_model(model, tokenizer, Path(out), force=force)


def _gguf_kind(dtype: str | None) -> Kind:
    """GGUF's name of a type."""
    kinds: dict[str | None, Kind] = {None: "F16", "float16": "F16", "fp16": "F16", "q8_0": "Q8_0"}
    require(dtype in kinds, f"dtype of a GGUF file must be fp16 or q8_0, got {dtype!r}")
    return kinds[dtype]


def convert_model(
    model: str | Path,
    out: str | Path,
    *,
    format: Literal["fathom", "hf", "gguf"] = "hf",
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in another format or type: :func:`load`, then :func:`save`.

    From one Hugging Face folder to another, tensors are streamed with no model in memory, and all
    that is not asked to change stays as it is, FP8 too.

    Args:
        dtype: float32, bfloat16, float16 (or fp32, bf16, fp16), or with ``hf`` fp8; with ``gguf``
            fp16 or q8_0; None: as it is.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: as :func:`save`.
    """
    if format == "gguf":
        _gguf_kind(dtype)  # checked before a large model is loaded
        loaded = load(model, progress=progress)
        save(loaded, out, format=format, dtype=dtype, force=force, progress=progress)
        return
    dtype = dtype if dtype is None else SHORT.get(dtype, dtype)
    known = f"dtype must be one of {', '.join(SAVED)}, got {dtype!r}"
    require(dtype is None or dtype in SAVED, known)
    path = located(model)
    if format == "hf" and is_foreign(path):
        opened = open_checkpoint(path)
        if opened.family is not None:
            export = of_folder(opened)
            write_hf(export, Path(out), dtype=dtype, force=force, progress=progress)
            return
    require(format == "hf" or dtype != "fp8", "dtype fp8 goes with format='hf'")
    loaded = load(model, dtype=None if dtype == "fp8" else dtype, progress=progress)
    stored = dtype if format == "hf" else None
    save(loaded, out, format=format, dtype=stored, force=force, progress=progress)


@torch.inference_mode()
def difference(one: str | Path, other: str | Path) -> tuple[float, float]:
    """How far the logits of two checkpoints lie apart, in float32 on up to 64 random tokens.

    Returns:
        The largest difference, and the share of places where the likeliest token is the same.
    """
    first = load(one, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(64, first.cfg.max_seq_len))
    tokens = torch.randint(first.cfg.vocab_size, shape, generator=generator)
    want = first(tokens)
    del first  # two models of any size need not fit
    got = load(other, dtype="float32")(tokens)
    same = (got.argmax(-1) == want.argmax(-1)).float().mean()
    return (got - want).abs().max().item(), same.item()


def size(
    model: str | Path | ModelConfig, *, seq_len: int | None = None, cache_dtype: str = "bfloat16"
) -> sizing.Size:
    """:func:`fathom.sizing.size` of a preset, a config, or whatever else ``build`` takes."""
    return sizing.size(resolve(model), seq_len=seq_len, cache_dtype=cache_dtype)


def resolve(
    model: str | Path | ModelConfig,
    assignments: Sequence[str] = (),
    changes: Mapping[str, object] | None = None,
) -> ModelConfig:
    """The config that a name, path or config means, with changes on top; see :func:`build`."""
    cfg = model if isinstance(model, ModelConfig) else _named(model)
    if not assignments and not changes:
        return cfg
    plain = {key: _plain(value) for key, value in (changes or {}).items()}
    keys = [text.strip().removeprefix("--").removeprefix("model.") for text in assignments]
    return parse(ModelConfig, override({**to_data(cfg), **plain}, keys))


def _named(model: str | Path) -> ModelConfig:
    path = located(model, weights=False)
    if str(model) in PRESETS or not path.exists():
        if isinstance(model, Path) or path.suffix == ".toml" or len(path.parts) > 1:
            raise ConfigError(f"there is no {path}: give a preset, a config or a run folder")
        return preset(model)
    _refuse_pickles(path)
    if is_gguf(path):
        return open_gguf(path).cfg
    if is_foreign(path):
        return read_config(read_folder_config(path), f"{path / HF_CONFIG}")
    data = read_toml(_config_file(path) if path.is_dir() else path)
    return parse(ModelConfig, with_preset(data)["model"] if "model" in data else data)


def _config_file(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is neither a run folder nor a checkpoint: no {CONFIG}")
    return folder / CONFIG


def _refuse_pickles(path: Path) -> None:
    if path.is_file() and path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read: give a run folder, or a "
            "checkpoint folder with safetensors"
        )


def _plain(value: object) -> object:
    """A config class as plain data; tuples of them too."""
    if dataclasses.is_dataclass(value):
        return to_data(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    dtype = SHORT.get(dtype, dtype)
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def register_attention(name: str, config: type[AttentionConfig]) -> None:
    """Make ``kind = "<name>"`` of an attention mean ``config``, in every config file from now on.

    Raises:
        ValueError: the class does not fit, or the name is taken by another one.
    """
    _register(ATTENTION, "attention", AttentionConfig, name, config)


def register_ffn(name: str, config: type[FFNConfig]) -> None:
    """The same for an FFN."""
    _register(FFNS, "ffn", FFNConfig, name, config)


def _register(
    table: dict[str, type[C]], what: str, base: type[C], name: str, config: type[C]
) -> None:
    label = getattr(config, "__qualname__", repr(config))
    require(
        isinstance(config, type) and issubclass(config, base) and dataclasses.is_dataclass(config),
        f"{label} cannot be an {what}: it must be a frozen dataclass derived from {base.__name__}",
    )
    require(
        getattr(config, "kind", None) == name,
        f'{label} needs the field  kind: Literal["{name}"] = "{name}"  to be registered so: '
        "configs pick the class by it",
    )
    missing = sorted(getattr(config, "__abstractmethods__", ()))
    require(not missing, f"{label} lacks {', '.join(missing)}: see {base.__name__}")
    taken = table.get(name, config)
    same = (taken.__module__, taken.__qualname__) == (config.__module__, config.__qualname__)
    require(same, f"{what} {name!r} is already {taken.__qualname__}: choose another name")
    table[name] = config
    refresh()
