"""``config.json`` of Hugging Face: read key by key, within bounds; written in both spellings.

A family asks for each key by name, so what it does not ask for has no effect. Keys that would
change the numbers, and that no family here follows, must be absent or neutral. All others are kept
beside the model and written again.
"""

from collections.abc import Collection, Mapping
from typing import Any

from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.convert.run_folder import CheckpointError
from fathom.layers.position import RopeConfig
from fathom.layers.rope import (
    AnyScaling,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
)

Data = Mapping[str, Any]
TINY, WIDE, LONG = 2**12, 2**16, 2**24  # bounds of counts, of widths, of lengths
DTYPES = ("float32", "bfloat16", "float16", "float64")

NEUTRAL: dict[str, Collection[Any]] = {  # key: the values that change nothing; absent is one
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_qk_layernorm": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "moe_layer_freq": (1,),
    "mlp_layer_types": (),
    "per_layer_config": (),
    "index_topk": (),
    "index_n_heads": (),
    "compression_config": (),
}
FULL = {"full_attention"}
CODE = ("auto_map", "_attn_implementation_internal", "_experts_implementation_internal")


def printable(value: object) -> str:
    """The beginning of a stranger's value, which may hold what a terminal would obey."""
    text = str(value)[:80]
    return text if text.isprintable() else repr(text)


class HFConfig:
    """The keys of a ``config.json``; null means absent, as it does to transformers.

    Every getter raises ``CheckpointError`` with the key's name and what is allowed.
    """

    def __init__(self, data: Data, source: str) -> None:
        self.data, self.source = data, source

    def refuse(self, key: str, why: str) -> CheckpointError:
        name, value = printable(key), printable(self.data.get(key))
        return CheckpointError(f"{self.source} cannot be used: {name} is {value}, {why}")

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def named(self, key: str) -> None:
        """Refuse a config that does not even name a key whose null has a meaning of its own."""
        if key not in self.data:
            raise CheckpointError(f"{self.source} cannot be used: it has no {key}")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = WIDE
    ) -> int:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(key, f"but must be a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if (type(value) is int or type(value) is float) and least < value <= 1e12:
            return float(value)
        raise self.refuse(key, f"but must be a number above {least:g}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        if value is not None and type(value) is not bool:
            raise self.refuse(key, "but must be true or false")
        return default if value is None else value

    def only(self, key: str, allowed: Collection[Any], *, why: str = "is followed") -> None:
        """Refuse a value that is neither absent nor one of ``allowed``."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            shown = " or ".join(str(item) for item in (*allowed, "null"))
            raise self.refuse(key, f"and only {shown} {why} here")

    def neutral(self, followed: Collection[str] = ()) -> None:
        """Refuse every known key that would change the numbers and is not ``followed``."""
        for key in NEUTRAL.keys() - set(followed):
            self.only(key, NEUTRAL[key])
        kinds = None if "layer_types" in followed else self.data.get("layer_types")
        if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - FULL):
            raise self.refuse("layer_types", "and only full_attention is followed here")


def read_frame(
    hf: HFConfig, groups: tuple[LayerGroup, ...], mtp: MTPConfig | None = None
) -> ModelConfig:
    """What every family has around its layers."""
    trained = hf.integer("max_position_embeddings", 2048, most=LONG)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size", most=2**20),
        dim=hf.integer("hidden_size"),
        groups=groups,
        max_seq_len=round(trained * _growth(groups)),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings"),
        init_std=hf.number("initializer_range", 0.02),
        mtp=mtp,
    )


def write_frame(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of :func:`read_frame`, and those that say what is usual."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "max_position_embeddings": round(cfg.max_seq_len / _growth(cfg.groups)),
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _growth(groups: tuple[LayerGroup, ...]) -> float:
    """By how much a context may pass ``max_position_embeddings``: RoPE's dynamic scaling alone."""
    position = getattr(groups[0].attention, "position", None)
    scaling = position.scaling if isinstance(position, RopeConfig) else None
    return scaling.factor if isinstance(scaling, DynamicScaling) else 1.0


# --- RoPE ------------------------------------------------------------------------------------


def read_position(hf: HFConfig) -> RopeConfig:
    """The rotation, from ``rope_scaling`` and ``rope_theta`` (v4) or ``rope_parameters`` (v5)."""
    rope = hf.data.get("rope_scaling") or hf.data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise hf.refuse("rope_scaling", "but must be an object")
    inner = HFConfig({"rope_theta": hf.data.get("rope_theta"), **rope}, f"{hf.source}, RoPE")
    theta = inner.number("rope_theta", 10000.0, least=1.0)
    return RopeConfig(theta=theta, scaling=_read_scaling(hf, inner))


def _read_scaling(hf: HFConfig, rope: HFConfig) -> AnyScaling | None:
    kind = rope.data.get("rope_type", rope.data.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        key = "rope_type" if "rope_type" in rope.data else "type"
        raise rope.refuse(key, f"but must be one of {', '.join(_KEYS)}")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_KEYS[kind]}
    for key in rope.data.keys() - known:
        rope.only(key, (), why=f"goes with {kind}")
    rope.only("partial_rotary_factor", (1,))
    if kind == "default":
        return None
    trained = hf.integer("max_position_embeddings", 2048, most=LONG)
    factor = _factor(hf, rope, trained)
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "dynamic":
        return DynamicScaling(factor=factor, original_seq_len=trained)
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            original_seq_len=_original(hf, rope, trained),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return _read_yarn(hf, rope, factor, trained)


_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
}


def _read_yarn(hf: HFConfig, rope: HFConfig, factor: float, trained: int) -> YarnScaling:
    def given(key: str) -> float | None:
        """A number; 0 and null mean the default, as to transformers."""
        return rope.number(key) if rope.data.get(key) else None

    attention_factor = rope.number("attention_factor") if rope.has("attention_factor") else None
    return YarnScaling(
        factor=factor,
        original_seq_len=_original(hf, rope, trained),
        beta_fast=given("beta_fast") or 32.0,
        beta_slow=given("beta_slow") or 1.0,
        mscale=given("mscale"),
        mscale_all_dim=given("mscale_all_dim"),
        explicit_attention_factor=attention_factor,
        truncate=rope.flag("truncate", True),
    )


def _original(hf: HFConfig, rope: HFConfig, trained: int) -> int:
    """The context before it was stretched; a key beside the RoPE's own goes before that in it."""
    key = "original_max_position_embeddings"
    return (hf if hf.has(key) else rope).integer(key, trained, most=LONG)


def _factor(hf: HFConfig, rope: HFConfig, trained: int) -> float:
    if not rope.has("factor") and rope.data.get("rope_type", rope.data.get("type")) == "yarn":
        return max(1.0, trained / _original(hf, rope, trained))
    factor = rope.number("factor")
    if factor < 1:
        raise rope.refuse("factor", "but must be at least 1")
    return factor


def write_position(position: RopeConfig) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a rotation; :func:`respelled` adds the rest."""
    return {"rope_theta": position.theta, "rope_scaling": _write_scaling(position.scaling)}


def _write_scaling(scaling: AnyScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    data: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        data["original_max_position_embeddings"] = scaling.original_seq_len
    if isinstance(scaling, Llama3Scaling):
        data["low_freq_factor"] = scaling.low_freq_factor
        data["high_freq_factor"] = scaling.high_freq_factor
    if isinstance(scaling, YarnScaling):
        data |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        more = {
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
            "attention_factor": scaling.explicit_attention_factor,
            "truncate": None if scaling.truncate else False,
        }
        data |= {key: value for key, value in more.items() if value is not None}
    return data


# --- Both spellings --------------------------------------------------------------------------


def respelled(data: Data, dtype: str | None) -> dict[str, Any]:
    """The same config with RoPE and dtype as v4 and as v5 of transformers look for them.

    Args:
        dtype: what the weights are stored in; None: as the config says.

    Keys that name code to run are left out, for the code does not come along.
    """
    rope = dict(data.get("rope_scaling") or data.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type")) or "default"
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    rope = {"rope_type": kind, **rope}
    rope.pop("type", None)
    dtype = dtype or stored_dtype(data)
    return {
        **{key: value for key, value in data.items() if key not in CODE},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {**rope, "type": kind},
        "rope_parameters": {**rope, "rope_theta": theta},
        **({} if dtype is None else {"dtype": dtype, "torch_dtype": dtype}),
    }


def stored_dtype(data: Data) -> str | None:
    """What the config says that the weights are stored in, if it says something known."""
    said = data.get("dtype") or data.get("torch_dtype")
    return said if said in DTYPES else None
