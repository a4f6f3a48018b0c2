"""The families of Hugging Face checkpoints: model type to rules and configs, in one table.

To read, ``model_type`` picks the family. To write, the parts of the model do.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fathom.attention import DSAConfig, MHAConfig, MLAConfig
from fathom.config import ModelConfig
from fathom.convert import deepseek_config
from fathom.convert.deepseek import deepseek_rules
from fathom.convert.hf_config import HFConfig
from fathom.convert.llama import llama_rules, read_llama, write_llama
from fathom.convert.rules import Rule
from fathom.convert.run_folder import CheckpointError
from fathom.ffn import DenseConfig, MoEConfig
from fathom.settings import ConfigError

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one model type is read and written.

    Args:
        architecture: the class that Hugging Face's ``architectures`` names.
        read: the model of a ``config.json``.
        write: the ``config.json`` of a model.
        rules: the rules of a model whose ``config.json`` is given.
        follows: keys that it follows and others must not have.
    """

    architecture: str
    read: Callable[[HFConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig, Data], list[Rule]]
    follows: tuple[str, ...] = ()


def _plain(cfg: ModelConfig, data: Data) -> list[Rule]:
    return llama_rules(cfg)


def _deepseek(cfg: ModelConfig, data: Data) -> list[Rule]:
    return deepseek_rules(cfg, interleaved=data.get("rope_interleave") is not False)


_V3 = Family("DeepseekV3ForCausalLM", deepseek_config.read_v3, deepseek_config.write_v3, _deepseek)
_V32 = Family(
    "DeepseekV32ForCausalLM",
    deepseek_config.read_v32,
    deepseek_config.write_v32,
    _deepseek,
    follows=("index_n_heads", "index_topk", "layer_types", "mlp_layer_types"),
)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", read_llama, write_llama, _plain),
    "deepseek": Family(
        "DeepseekForCausalLM", deepseek_config.read_v1, deepseek_config.write_v1, _deepseek
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", deepseek_config.read_v2, deepseek_config.write_v2, _deepseek
    ),
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "deepseek_v32": _V32,
}


def read_config(data: Data, source: str) -> ModelConfig:
    """The model that a ``config.json`` describes.

    Raises:
        CheckpointError: an unknown family, or a key whose value is not followed, by name.
    """
    hf = HFConfig(data, source)
    family = family_of(hf)
    hf.neutral(family.follows)
    try:
        return family.read(hf)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from None


def family_of(hf: HFConfig) -> Family:
    name = hf.data.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise hf.refuse("model_type", f"but must be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model, v4 spelling, without what depends on its tokenizer.

    Raises:
        ConfigError: no family of Hugging Face has such a model; the sentence says which part.
    """
    _require_uniform(cfg)
    name = _family_for(cfg)
    family = FAMILIES[name]
    try:
        written = family.write(cfg)
    except ValueError as error:
        raise ConfigError(f"this model cannot be written for Hugging Face: {error}") from None
    return {"architectures": [family.architecture], "model_type": name, **written}


def _family_for(cfg: ModelConfig) -> str:
    moes = [group.ffn for group in cfg.groups if isinstance(group.ffn, MoEConfig)]
    if isinstance(cfg.groups[0].attention, MHAConfig):
        return "deepseek" if moes else "llama"
    if isinstance(cfg.groups[0].attention, DSAConfig):
        return "deepseek_v32"
    return "deepseek_v2" if moes and moes[0].score_func == "softmax" else "deepseek_v3"


def _require_uniform(cfg: ModelConfig) -> None:
    """Hugging Face's families know one attention, dense layers first, then MoE layers."""
    attentions = {group.attention for group in cfg.groups}
    ffns = [group.ffn for group in cfg.groups]
    kinds = [isinstance(ffn, MoEConfig) for ffn in ffns]
    ok = (
        len(attentions) == 1
        and isinstance(cfg.groups[0].attention, MHAConfig | MLAConfig)
        and all(isinstance(ffn, DenseConfig | MoEConfig) for ffn in ffns)
        and kinds == sorted(kinds)
        and len(set(ffns)) == len(set(kinds))
        and (cfg.mtp is None or isinstance(cfg.groups[0].attention, MLAConfig))
    )
    if not ok:
        raise ConfigError(
            "this model cannot be written for Hugging Face: a family there has one attention, mha, "
            "mla or dsa, in all layers, equal dense layers and then equal MoE layers, and MTP with "
            "mla or dsa; save it with format='fathom'"
        )


TABLES_OF_ROPE = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
LAYER = re.compile(r"model\.layers\.(\d{1,9})\..*")


def may_be_left_out(name: str, cfg: ModelConfig, family: Family) -> bool:
    """Whether a tensor is not missed: RoPE's tables, and V3's MTP where no MTP is asked for."""
    if TABLES_OF_ROPE.fullmatch(name):
        return True
    layer = LAYER.fullmatch(name) if family in (_V3, _V32) and cfg.mtp is None else None
    return layer is not None and int(layer[1]) >= cfg.n_layers
