"""The attentions: ``kind`` in a config picks the class, the class builds the module."""

from fathom.attention.base import Attention, AttentionConfig, Indexing
from fathom.attention.dsa import DSAConfig
from fathom.attention.mha import MHAConfig
from fathom.attention.mla import MLAConfig
from fathom.attention.moba import MoBAConfig
from fathom.attention.nsa import NSAConfig

ATTENTION: dict[str, type[AttentionConfig]] = {
    "mha": MHAConfig,
    "mla": MLAConfig,
    "moba": MoBAConfig,
    "dsa": DSAConfig,
    "nsa": NSAConfig,
}

__all__ = [
    "ATTENTION",
    "Attention",
    "AttentionConfig",
    "DSAConfig",
    "Indexing",
    "MHAConfig",
    "MLAConfig",
    "MoBAConfig",
    "NSAConfig",
]
