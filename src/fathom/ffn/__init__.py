"""The FFNs: ``kind`` in a config picks the class, the class builds the module."""

from fathom.ffn.base import FFN, FFNConfig, Routing
from fathom.ffn.dense import DenseConfig
from fathom.ffn.moe import MoEConfig

FFNS: dict[str, type[FFNConfig]] = {"dense": DenseConfig, "moe": MoEConfig}

__all__ = ["FFN", "FFNS", "DenseConfig", "FFNConfig", "MoEConfig", "Routing"]
