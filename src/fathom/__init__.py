"""Fathom: from Llama to DeepSeek, one measured step at a time.

The public names are resolved on first use (PEP 562), so ``import fathom`` brings no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathom.api import build, load, register_attention, register_ffn, save, size
    from fathom.attention import Attention, AttentionConfig
    from fathom.config import LayerGroup, ModelConfig, MTPConfig
    from fathom.ffn import FFN, FFNConfig, Routing
    from fathom.generate import Engine, Generation
    from fathom.layers.cache import Stream
    from fathom.layers.step import Step
    from fathom.presets import PRESETS, preset, sized

__version__ = "0.1.0"

__all__ = [
    "FFN",
    "PRESETS",
    "Attention",
    "AttentionConfig",
    "Engine",
    "FFNConfig",
    "Generation",
    "LayerGroup",
    "MTPConfig",
    "ModelConfig",
    "Routing",
    "Step",
    "Stream",
    "build",
    "load",
    "preset",
    "register_attention",
    "register_ffn",
    "save",
    "size",
    "sized",
]

_HOMES = {
    "fathom.api": ("build", "load", "register_attention", "register_ffn", "save", "size"),
    "fathom.attention": ("Attention", "AttentionConfig"),
    "fathom.config": ("LayerGroup", "MTPConfig", "ModelConfig"),
    "fathom.ffn": ("FFN", "FFNConfig", "Routing"),
    "fathom.generate": ("Engine", "Generation"),
    "fathom.layers.cache": ("Stream",),
    "fathom.layers.step": ("Step",),
    "fathom.presets": ("PRESETS", "preset", "sized"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fathom' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
