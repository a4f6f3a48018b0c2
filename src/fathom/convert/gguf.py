"""A Llama in a GGUF file as a checkpoint: its fields as the JSON files of a Hugging Face folder.

So everything that holds for such a folder (bounds, refusals, saving) holds for the file too.
llama.cpp turns adjacent pairs of query and key rows and stores them in that order; the rules of
Meta's files bring them into ours. Without that the model still speaks, only worse.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fathom.convert.checkpoint import Checkpoint, Origin
from fathom.convert.families import FAMILIES, read_config
from fathom.convert.gguf_file import GGUFFile
from fathom.convert.gguf_tokenizer import tokenizer_files
from fathom.convert.llama import llama_rules
from fathom.convert.names import Renamed
from fathom.convert.run_folder import CheckpointError
from fathom.layers.rope import Llama3Scaling, inverse_frequencies

SUFFIX = ".gguf"
FRAME = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
KEYS = {  # of a config.json: the field
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
}
OTHERS = {  # read elsewhere, or without effect
    "vocab_size",
    "tensor_data_layout",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}


def is_gguf(path: Path) -> bool:
    """Whether a path means a GGUF file."""
    return path.suffix == SUFFIX and not path.is_dir()


def open_gguf(path: Path, *, interleaved: bool = True) -> Checkpoint:
    """A GGUF file as a checkpoint.

    Args:
        path: the file.
        interleaved: query and key rows lie in adjacent pairs, as llama.cpp wants them; False takes
            them as they are, which is wrong for its files, and how wrong can be measured.

    Raises:
        CheckpointError: what cannot be used, by field or tensor.
    """
    file = GGUFFile(path)
    config = hf_config(file, f"{path}")
    cfg = read_config(config, f"{path}")
    rules = llama_rules(cfg, interleaved=interleaved)
    origin = Origin(config, tokenizer_files(file.fields, f"{path}"))
    return Checkpoint(path, cfg, rules, Renamed(file, hf_name), origin, FAMILIES["llama"])


def hf_name(name: str) -> str | None:
    """``blk.3.attn_q.weight`` as ``model.layers.3.self_attn.q_proj.weight``."""
    first, *rest = name.split(".")
    if name == ROPE_FACTORS:
        return None
    if first == "blk" and len(rest) == 3:
        index, part, kind = rest
        return f"model.layers.{index}.{LAYER.get(part, part)}.{kind}"
    return ".".join([FRAME.get(first, first), *rest])


def hf_config(file: GGUFFile, source: str) -> dict[str, Any]:
    """What the ``config.json`` of the same model would be.

    Raises:
        CheckpointError: another architecture, or a field whose meaning is not followed.
    """
    fields = file.fields
    if (found := fields.get("general.architecture")) != "llama":
        raise CheckpointError(
            f"{source} cannot be used: general.architecture is {found!r:.40}, and of GGUF files "
            "only llama is read"
        )
    said = {
        name.removeprefix("llama."): value
        for name, value in fields.items()
        if name.startswith("llama.")
    }
    strange = sorted(said.keys() - set(KEYS.values()) - OTHERS)
    if strange:
        raise CheckpointError(f"{source} cannot be used: llama.{strange[0]} is not followed here")
    config: dict[str, Any] = {
        key: _plain(said[field]) for key, field in KEYS.items() if field in said
    }
    config |= {
        "architectures": [FAMILIES["llama"].architecture],
        "model_type": "llama",
        "vocab_size": _rows(file, "token_embd.weight", source),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
    }
    _check_widths(said, config, source)
    scaling = _scaling(said) or _factors(file, config, source)
    return config if scaling is None else {**config, "rope_scaling": scaling}


def _plain(value: Any) -> Any:
    """float32 as the shortest decimal that means it: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rows(file: GGUFFile, name: str, source: str) -> int:
    if name not in file.entries:
        raise CheckpointError(f"{source} lacks the tensor {name!r}")
    return file.entries[name].shape[0]


def _check_widths(said: Mapping[str, Any], config: Mapping[str, Any], source: str) -> None:
    """All of a head is rotated, and values are as wide as keys."""
    try:
        usual = config["hidden_size"] // config["num_attention_heads"]
    except (KeyError, TypeError, ZeroDivisionError):
        raise CheckpointError(f"{source} does not say its widths and heads") from None
    width = config.get("head_dim", usual)
    for name in ("attention.value_length", "rope.dimension_count"):
        if said.get(name, width) != width:
            raise CheckpointError(
                f"{source} cannot be used: llama.{name} is {said[name]!r:.40}, and only the width "
                f"of a head, {width}, is followed here"
            )


def _scaling(said: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = said.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _plain(said.get("rope.scaling.factor"))}
    if kind != "linear":
        original = said.get("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _factors(file: GGUFFile, config: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Llama 3.1's scaling, which GGUF stores as a divisor for each pair of channels.

    Raises:
        CheckpointError: the divisors are another scaling's.
    """
    if ROPE_FACTORS not in file.entries:
        return None
    stored = file.read(ROPE_FACTORS).float().flatten()
    plain = inverse_frequencies(2 * len(stored), config.get("rope_theta", 10000.0))
    scaling = Llama3Scaling(factor=max(1.0, float(stored.max())), original_seq_len=8192)
    if not torch.allclose(plain / scaling.scale(plain, 0.0, 0), stored, rtol=1e-3):
        raise CheckpointError(f"{source} cannot be used: {ROPE_FACTORS} is not that of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
