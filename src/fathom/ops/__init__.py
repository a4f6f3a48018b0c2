"""The operations that the heavy work is made of: contract, reference, and the choice of what runs.

``table`` says of every op what runs where; ``why_not`` says what an implementation lacks.
"""

from typing import NamedTuple

import torch

from fathom.ops.adamw import ADAMW, adamw
from fathom.ops.attention import ATTENTION, attention
from fathom.ops.block_attention import BLOCK_ATTENTION, block_attention
from fathom.ops.cross_entropy import CROSS_ENTROPY, linear_cross_entropy, token_cross_entropy
from fathom.ops.experts import EXPERTS, experts
from fathom.ops.grouped_mm import GROUPED_MM, grouped_mm
from fathom.ops.indexer import INDEX_LOSS, INDEX_TOPK, index_loss, index_topk
from fathom.ops.norm import rms_norm
from fathom.ops.packed_attention import PACKED_ATTENTION, packed_attention
from fathom.ops.permute import PERMUTE, Permutation, combine, gather, sort_by_expert
from fathom.ops.range_attention import RANGE_ATTENTION, range_attention
from fathom.ops.registry import Impl, Implementations, choose, no_kernel, takes_all
from fathom.ops.rope import rotate
from fathom.ops.router import LOGITS, ROUTER, best_experts, router_logits
from fathom.ops.selection import (
    SELECT_BY_IMPORTANCE,
    SELECT_BY_MEAN,
    select_by_importance,
    select_by_mean,
)
from fathom.ops.token_attention import TOKEN_ATTENTION, token_attention

__all__ = [
    "OPS",
    "Impl",
    "OpRow",
    "Permutation",
    "adamw",
    "attention",
    "best_experts",
    "block_attention",
    "choose",
    "combine",
    "experts",
    "gather",
    "grouped_mm",
    "index_loss",
    "index_topk",
    "linear_cross_entropy",
    "packed_attention",
    "range_attention",
    "rms_norm",
    "rotate",
    "router_logits",
    "select_by_importance",
    "select_by_mean",
    "sort_by_expert",
    "table",
    "token_attention",
    "token_cross_entropy",
    "why_not",
]


def _plain(op: str) -> Implementations:
    return Implementations(op=op, refusals={"triton": no_kernel, "torch": takes_all})


OPS = {
    "adamw": ADAMW,
    "attention": ATTENTION,
    "block_attention": BLOCK_ATTENTION,
    "cross_entropy": CROSS_ENTROPY,
    "experts": EXPERTS,
    "grouped_mm": GROUPED_MM,
    "index_loss": INDEX_LOSS,
    "index_topk": INDEX_TOPK,
    "norm": _plain("norm"),
    "packed_attention": PACKED_ATTENTION,
    "permute": PERMUTE,
    "range_attention": RANGE_ATTENTION,
    "rope": _plain("rope"),
    "router": ROUTER,
    "router_logits": LOGITS,
    "select_by_importance": SELECT_BY_IMPORTANCE,
    "select_by_mean": SELECT_BY_MEAN,
    "token_attention": TOKEN_ATTENTION,
}


class OpRow(NamedTuple):
    """What runs of one op, and why nothing faster does."""

    op: str
    cpu: str  # implementation for the CPU dtype asked for
    cuda: str  # implementation for the CUDA dtype asked for
    why_not: str  # why not the kernel; "" if it runs


def why_not(
    op_name: str, device: str, dtype: torch.dtype = torch.float32, *, impl: str = "triton"
) -> str:
    """What keeps ``impl`` of an op from running on this device and dtype; "" if nothing does."""
    return OPS[op_name].why_not(impl, device, dtype)


def table(
    cpu_dtype: torch.dtype = torch.float32, cuda_dtype: torch.dtype = torch.bfloat16
) -> list[OpRow]:
    """One row for each op: what runs on the CPU, what on CUDA, and why not the kernel there."""
    return [
        OpRow(
            name,
            cpu=implementations.fastest("cpu", cpu_dtype),
            cuda=implementations.fastest("cuda", cuda_dtype),
            why_not=implementations.why_not("triton", "cuda", cuda_dtype),
        )
        for name, implementations in OPS.items()
    ]
