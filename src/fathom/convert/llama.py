"""Llama checkpoints: rules under Hugging Face names, ``config.json``, and Meta's own files.

Hugging Face's RoPE turns halves, as ours, so every tensor is only renamed. Meta's files turn
adjacent pairs. A tied head is not stored.
"""

from collections.abc import Sequence
from typing import Any

from fathom.attention import MHAConfig
from fathom.config import LayerGroup, ModelConfig
from fathom.convert.hf_config import (
    TINY,
    HFConfig,
    read_frame,
    read_position,
    write_frame,
    write_position,
)
from fathom.convert.rules import Copy, Deinterleave, Rename, Rule
from fathom.ffn import DenseConfig
from fathom.layers.base import require
from fathom.layers.position import RopeConfig


def llama_rules(cfg: ModelConfig, *, interleaved: bool = False) -> list[Rule]:
    """The rules of a whole Llama-like model.

    Args:
        cfg: the model.
        interleaved: their RoPE turns adjacent pairs (Meta's files).
    """
    rules = frame_rules(cfg)
    for index, group in enumerate(cfg.layers()):
        rules += layer_rules(index, group, interleaved)
    return rules


def frame_rules(cfg: ModelConfig) -> list[Rule]:
    """Embedding, final norm and head."""
    rules: list[Rule] = [
        Rename("embed.weight", "model.embed_tokens.weight"),
        Rename("norm.weight", "model.norm.weight"),
    ]
    if cfg.tie_embeddings:
        return [*rules, Copy("embed.weight", "lm_head.weight", written=False)]
    return [*rules, Rename("head.weight", "lm_head.weight")]


def layer_rules(index: int, group: LayerGroup, interleaved: bool) -> list[Rule]:
    """One layer: two norms, attention, MLP."""
    ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
    assert isinstance(group.attention, MHAConfig)
    assert isinstance(group.ffn, DenseConfig)
    return [
        *norm_rules(ours, theirs),
        *attention_rules(group.attention, ours, theirs, interleaved),
        *mlp_rules(ours + "ffn.", theirs + "mlp.", bias=group.ffn.bias),
    ]


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        Rename(ours + "attention_norm.weight", theirs + "input_layernorm.weight"),
        Rename(ours + "ffn_norm.weight", theirs + "post_attention_layernorm.weight"),
    ]


def attention_rules(
    cfg: MHAConfig, ours: str, theirs: str, interleaved: bool = False
) -> list[Rule]:
    """Llama's attention: four projections, each with a bias where the config says so."""

    def rule(part: str, kind: str) -> Rule:
        names = f"{ours}attention.w{part}.{kind}", f"{theirs}self_attn.{part}_proj.{kind}"
        turned = interleaved and part in "qk"
        return Deinterleave(*names, cfg.head_dim, cfg.head_dim) if turned else Rename(*names)

    biased = {"q": cfg.qkv_bias, "k": cfg.qkv_bias, "v": cfg.qkv_bias, "o": cfg.out_bias}
    return [rule(part, kind) for part, bias in biased.items() for kind in kinds(bias)]


def mlp_rules(ours: str, theirs: str, *, bias: bool = False) -> list[Rule]:
    """A SwiGLU: gate, up, down."""
    return [
        Rename(f"{ours}w_{part}.{kind}", f"{theirs}{part}_proj.{kind}")
        for part in ("gate", "up", "down")
        for kind in kinds(bias)
    ]


def kinds(bias: bool) -> Sequence[str]:
    """The tensors of a projection."""
    return ("weight", "bias") if bias else ("weight",)


# --- config.json -----------------------------------------------------------------------------


def read_llama(hf: HFConfig) -> ModelConfig:
    """A ``config.json`` of model type ``llama``."""
    ffn = DenseConfig(
        inter_dim=hf.integer("intermediate_size", most=2**20), bias=hf.flag("mlp_bias")
    )
    count = hf.integer("num_hidden_layers", most=1000)
    return read_frame(hf, (LayerGroup(count=count, attention=read_mha(hf), ffn=ffn),))


def read_mha(hf: HFConfig) -> MHAConfig:
    n_heads, bias = hf.integer("num_attention_heads", most=TINY), hf.flag("attention_bias")
    return MHAConfig(
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads, most=TINY),
        head_dim=hf.integer("head_dim", hf.integer("hidden_size") // n_heads),
        position=read_position(hf),
        qkv_bias=bias,
        out_bias=bias,
    )


def write_llama(cfg: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model whose layers are all alike."""
    group = cfg.groups[0]
    assert isinstance(group.attention, MHAConfig)
    assert isinstance(group.ffn, DenseConfig)
    return {
        **write_frame(cfg),
        **write_mha(group.attention),
        "intermediate_size": group.ffn.inter_dim,
        "mlp_bias": group.ffn.bias,
    }


def write_mha(cfg: MHAConfig) -> dict[str, Any]:
    """The keys of :func:`read_mha`.

    Raises:
        ValueError: what Llama's attention does not have.
    """
    for usual, what in (
        (type(cfg.position) is RopeConfig, f"position = {cfg.position.kind!r}"),
        (not cfg.shared_query, "shared_query"),
        (cfg.window_size is None, "window_size"),
        (cfg.qkv_bias == cfg.out_bias, "qkv_bias without out_bias, or the reverse"),
    ):
        require(usual, f"Llama's attention in Hugging Face's files has no {what}")
    assert isinstance(cfg.position, RopeConfig)
    return {
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        **write_position(cfg.position),
    }
