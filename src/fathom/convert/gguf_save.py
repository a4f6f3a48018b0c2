"""A model as a GGUF file that llama.cpp reads: F16, or Q8_0 where rows hold whole blocks.

Of a Llama what ``gguf.py`` reads is written: the same names, query and key rows in adjacent pairs,
vectors in float32; DeepSeek's shapes are in ``gguf_deepseek.py``. Tensors are written one at a
time. The container is the library ``gguf``'s.
"""

import os
from collections.abc import Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.attention import MHAConfig, MLAConfig
from fathom.convert.gguf import FRAME, KEYS, LAYER, ROPE_FACTORS, SUFFIX
from fathom.convert.gguf_deepseek import ARCHITECTURE, deepseek_fields, deepseek_items
from fathom.convert.gguf_item import Item, Kind
from fathom.convert.gguf_tokenizer import tokenizer_fields
from fathom.convert.rules import Deinterleave
from fathom.convert.save import Export, counter, require_room
from fathom.convert.source import Progress
from fathom.layers.base import require
from fathom.layers.position import RopeConfig
from fathom.layers.rope import LinearScaling, Llama3Scaling, YarnScaling, inverse_frequencies

FILE_TYPES = {"F16": 1, "Q8_0": 7}


def write_gguf(
    export: Export,
    out: Path,
    *,
    kind: Kind = "F16",
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the file, which is there whole or not at all.

    Args:
        export: as for ``write_hf``.
        kind: of the matrices.
        force: replace a file at ``out``.

    Raises:
        ValueError: neither a Llama nor a DeepSeek-V2 or V3, a tokenizer that GGUF has no name for,
            or ``out`` is there already.
    """
    from gguf import GGUFWriter

    require(kind in FILE_TYPES, f"kind must be one of {', '.join(FILE_TYPES)}, got {kind!r}")
    require(out.suffix == SUFFIX, f"a GGUF file must be called *{SUFFIX}, got {out}")
    require(force or not os.path.lexists(out), f"{out} is there already: name another file")
    architecture, items, said = plan(export)
    said |= {
        **tokenizer_fields(export.files, export.cfg.vocab_size),
        "general.file_type": FILE_TYPES[kind],
    }
    require_room(out, export.source, export.files)
    partial = out.with_name(f"{out.name}.partial")
    try:
        writer = GGUFWriter(str(partial), architecture)
        for name, value in said.items():
            _add(writer, name, value)
        for item in items:
            _add_info(writer, item, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        report = counter(f"writing {out.name}", export.source, progress)
        last = {name: item for item in items for name in item.sources}  # a tensor may make several
        for item in items:
            made = item.make([export.source.read(name) for name in item.sources])
            assert tuple(made.shape) == item.shape, (item.name, made.shape, item.shape)
            writer.write_tensor_data(_content(made, item.form(kind)))
            for name in item.sources:
                if last[name] is item:
                    report(export.source.entries[name].num_bytes)
                    export.source.release(name)
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def plan(export: Export) -> tuple[str, list[Item], dict[str, Any]]:
    """The architecture's name, the tensors, and its own fields.

    Raises:
        ValueError: GGUF has no such model here.
    """
    attention, found = export.cfg.groups[0].attention, export.config.get("model_type")
    if isinstance(attention, MLAConfig):
        return ARCHITECTURE, deepseek_items(export), deepseek_fields(export)
    if found != "llama" or not isinstance(attention, MHAConfig):
        raise ValueError(
            f"Llamas and DeepSeek's V2 and V3 are written as GGUF, and this is {found!r}: use "
            "format='hf'"
        )
    return "llama", _llama_items(export, attention), llama_fields(export, attention)


def _llama_items(export: Export, attention: MHAConfig) -> list[Item]:
    items = [
        Item(_gguf_name(name), entry.shape, (name,), bound(_arranged, name, attention))
        for name, entry in export.source.entries.items()
    ]
    divisors = _divisors(attention)
    if divisors is None:
        return items
    return [Item(ROPE_FACTORS, tuple(divisors.shape), (), lambda _: divisors), *items]


def _gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` as ``blk.3.attn_q.weight``."""
    stem, _, last = name.rpartition(".")
    frame = {theirs: ours for ours, theirs in FRAME.items()}
    if stem in frame:
        return f"{frame[stem]}.{last}"
    layer = {theirs: ours for ours, theirs in LAYER.items()}
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{layer[part]}.{last}"


def _add_info(writer: Any, item: Item, kind: Kind) -> None:
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    name, shape, form = item.name, item.shape, item.form(kind)
    if form != "Q8_0":
        dtype = np.dtype(np.float32 if form == "F32" else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    rows = quant_shape_to_byte_shape(shape, GGMLQuantizationType.Q8_0)
    raw = GGMLQuantizationType.Q8_0
    writer.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=raw)


def _content(tensor: Tensor, form: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    numbers = tensor.float().contiguous().numpy()
    if form == "Q8_0":
        return quants.quantize(numbers, GGMLQuantizationType.Q8_0)
    return numbers if form == "F32" else numbers.astype(np.float16)


def _arranged(name: str, cfg: MHAConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Query and key rows in adjacent pairs, as llama.cpp turns them."""
    (tensor,) = tensors
    if ".q_proj." in name or ".k_proj." in name:
        return Deinterleave(name, name, cfg.head_dim, cfg.head_dim).save(tensor)
    return tensor


def _divisors(cfg: MHAConfig) -> Tensor | None:
    """Llama 3.1's scaling as llama.cpp stores it: a divisor for each pair of channels."""
    assert isinstance(cfg.position, RopeConfig)
    scaling = cfg.position.scaling
    if not isinstance(scaling, Llama3Scaling):
        return None
    plain = inverse_frequencies(cfg.head_dim, cfg.position.theta)
    return (plain / scaling.scale(plain, cfg.position.theta, 0)).to(torch.float32)


def llama_fields(export: Export, attention: MHAConfig) -> dict[str, Any]:
    """A Llama's own fields: the shape and the position.

    Raises:
        ValueError: what GGUF's Llama has no field for.
    """
    cfg = export.cfg
    config = {**export.config, "head_dim": attention.head_dim}
    config["num_key_value_heads"] = attention.n_kv_heads
    said = {f"llama.{field}": config[key] for key, field in KEYS.items() if key in config}
    assert isinstance(attention.position, RopeConfig)
    return said | {
        "llama.vocab_size": cfg.vocab_size,
        "llama.attention.value_length": attention.head_dim,
        "llama.attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "llama.rope.dimension_count": attention.head_dim,
        "llama.rope.freq_base": attention.position.theta,
        **_scaling_fields(attention.position),
    }


def _scaling_fields(position: RopeConfig) -> dict[str, Any]:
    scaling = position.scaling
    if scaling is None or isinstance(scaling, Llama3Scaling):
        return {}
    plain = isinstance(scaling, LinearScaling | YarnScaling)
    if isinstance(scaling, YarnScaling):
        usual = YarnScaling(factor=scaling.factor, original_seq_len=scaling.original_seq_len)
        plain = scaling == usual
    require(plain, f"GGUF's Llama has no field for the RoPE scaling {scaling}")
    said = {"llama.rope.scaling.type": scaling.kind, "llama.rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        said["llama.rope.scaling.original_context_length"] = scaling.original_seq_len
    return said


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    else:
        add = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        getattr(writer, f"add_{add}")(name, value)
