"""Llama checkpoints under Hugging Face names, as a list of rules.

Half-split RoPE on both sides, so every tensor is only renamed. A tied head is not stored.
"""

from collections.abc import Sequence

from fathom.attention import MHAConfig
from fathom.config import LayerGroup, ModelConfig
from fathom.convert.rules import Rename, Rule
from fathom.ffn import DenseConfig


def llama_rules(cfg: ModelConfig) -> list[Rule]:
    """The rules of a whole Llama-like model."""
    layers = enumerate(cfg.layers())
    return frame_rules(cfg) + [rule for i, group in layers for rule in layer_rules(i, group)]


def frame_rules(cfg: ModelConfig) -> list[Rule]:
    """Embedding, final norm and head."""
    rules: list[Rule] = [
        Rename("embed.weight", "model.embed_tokens.weight"),
        Rename("norm.weight", "model.norm.weight"),
    ]
    return rules if cfg.tie_embeddings else [*rules, Rename("head.weight", "lm_head.weight")]


def layer_rules(index: int, group: LayerGroup) -> list[Rule]:
    """One layer: two norms, attention, MLP."""
    ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
    assert isinstance(group.attention, MHAConfig)
    assert isinstance(group.ffn, DenseConfig)
    return [
        *norm_rules(ours, theirs),
        *attention_rules(group.attention, ours, theirs),
        *mlp_rules(ours + "ffn.", theirs + "mlp.", bias=group.ffn.bias),
    ]


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        Rename(ours + "attention_norm.weight", theirs + "input_layernorm.weight"),
        Rename(ours + "ffn_norm.weight", theirs + "post_attention_layernorm.weight"),
    ]


def attention_rules(cfg: MHAConfig, ours: str, theirs: str) -> list[Rule]:
    """Llama's attention: four projections, each with a bias where the config says so."""
    biased = {"q": cfg.qkv_bias, "k": cfg.qkv_bias, "v": cfg.qkv_bias, "o": cfg.out_bias}
    return [
        Rename(f"{ours}attention.w{part}.{kind}", f"{theirs}self_attn.{part}_proj.{kind}")
        for part, bias in biased.items()
        for kind in kinds(bias)
    ]


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
