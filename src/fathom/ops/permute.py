"""Tokens into expert order and back: what surrounds the grouped matmul of a mixture of experts.

Nothing here asks the device how many tokens an expert got, and nothing adds into memory that another
row adds into: both directions, and both gradients, are gathers, so they are deterministic.

Shapes: N tokens, K experts per token, P = N * K rows in expert order, E experts, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


class Permutation(NamedTuple):
    """Where each (token, choice) pair lies once pairs are sorted by expert."""

    order: Tensor  # [P] int64: sorted row -> pair t * K + k; equal experts keep token order
    inverse: Tensor  # [P] int64: pair -> sorted row
    ends: Tensor  # [E] int32: one past each expert's last row
    counts: Tensor  # [E] int64: rows of each expert


def sort_by_expert(expert_ids_NK: Tensor, n_experts: int) -> Permutation:
    """Sort the pairs by expert, stably, without a host synchronisation."""
    by_expert, order = expert_ids_NK.flatten().sort(stable=True)
    rows = torch.arange(order.shape[0], device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    experts = torch.arange(n_experts, device=order.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, experts, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return Permutation(order, inverse, ends.to(torch.int32), counts)


def gather(x_ND: Tensor, permutation: Permutation, top_k: int) -> Tensor:
    """Copy each token's row to its ``top_k`` places in expert order: ``[P, D]``."""
    return _Gather.apply(x_ND, permutation.order, permutation.inverse, top_k)


def combine(y_PD: Tensor, gates_NK: Tensor, permutation: Permutation) -> Tensor:
    """``out[t] = sum_k gates[t, k] * y[inverse[t, k]]`` ``[N, D]``: weighted sum of expert outputs.

    Products and sums are float32 (float64 for float64), rounded once to y's dtype.
    """
    return _Combine.apply(y_PD, gates_NK, permutation.order, permutation.inverse)


def gather_sum(y_PD: Tensor, rows_NK: Tensor, gates_NK: Tensor | None = None) -> Tensor:
    """``out[n] = sum_k gates[n, k] * y[rows[n, k]]``, without gates their plain sum."""
    wide = torch.promote_types(y_PD.dtype, torch.float32)
    if y_PD.device.type == "cpu" and y_PD.dtype == wide:  # one pass, 6 times faster
        gates = None if gates_NK is None else gates_NK.to(wide)
        return F.embedding_bag(rows_NK, y_PD, mode="sum", per_sample_weights=gates)
    picked_NKD = y_PD.index_select(0, rows_NK.flatten()).unflatten(0, rows_NK.shape).to(wide)
    if gates_NK is not None:
        picked_NKD = picked_NKD * gates_NK.to(wide)[..., None]
    return picked_NKD.sum(dim=1).to(y_PD.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_ND: Tensor, order: Tensor, inverse: Tensor, top_k: int
    ) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k  # pyright: ignore[reportAttributeAccessIssue]
        return x_ND.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gather_sum(grad_PD, inverse.view(-1, ctx.top_k)), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, y_PD: Tensor, gates_NK: Tensor, order: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_PD, gates_NK, order, inverse)
        return gather_sum(y_PD, inverse.view(gates_NK.shape), gates_NK)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_PD, gates_NK, order, inverse = ctx.saved_tensors
        wide = torch.promote_types(y_PD.dtype, torch.float32)
        grad_PD = grad_ND.index_select(0, order // gates_NK.shape[1]).to(wide)
        dy_PD = grad_PD * gates_NK.flatten().to(wide).index_select(0, order)[:, None]
        dgates_P = (grad_PD * y_PD).sum(-1)
        dgates_NK = dgates_P.index_select(0, inverse).view(gates_NK.shape)
        return dy_PD.to(y_PD.dtype), dgates_NK.to(gates_NK.dtype), None, None
