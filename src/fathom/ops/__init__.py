"""The operations that everything heavy is made of: contract, reference, and what runs.

``choose`` picks an implementation, ``why_not`` says why another does not run, and ``OPS`` lists all.
"""

import torch

from fathom.ops.attention import ATTENTION, attention
from fathom.ops.cross_entropy import linear_cross_entropy, token_cross_entropy
from fathom.ops.grouped_mm import GROUPED_MM, grouped_mm
from fathom.ops.norm import rms_norm
from fathom.ops.permute import Permutation, combine, gather, sort_by_expert
from fathom.ops.registry import Impl, Implementations, choose, no_kernel_yet, runs_anywhere
from fathom.ops.rope import rotate

__all__ = [
    "OPS",
    "Impl",
    "Permutation",
    "attention",
    "choose",
    "combine",
    "gather",
    "grouped_mm",
    "linear_cross_entropy",
    "rms_norm",
    "rotate",
    "sort_by_expert",
    "token_cross_entropy",
    "why_not",
]

PLAIN = {"triton": no_kernel_yet, "torch": runs_anywhere}
OPS = {
    "attention": ATTENTION,
    "cross_entropy": Implementations(op="cross_entropy", refusals=PLAIN),
    "grouped_mm": GROUPED_MM,
    "norm": Implementations(op="norm", refusals=PLAIN),
    "permute": Implementations(op="permute", refusals=PLAIN),
    "rope": Implementations(op="rope", refusals=PLAIN),
}


def why_not(op_name: str, impl: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """What ``impl`` of an op lacks on this device and dtype; "" if it runs."""
    return OPS[op_name].why_not(impl, device, dtype)
