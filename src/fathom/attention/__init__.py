"""The attentions: ``kind`` in a config picks the class, the class builds the module."""

from fathom.attention.base import Attention, AttentionConfig
from fathom.attention.mha import MHAConfig
from fathom.attention.mla import MLAConfig

ATTENTION: dict[str, type[AttentionConfig]] = {"mha": MHAConfig, "mla": MLAConfig}

__all__ = ["ATTENTION", "Attention", "AttentionConfig", "MHAConfig", "MLAConfig"]
