"""Tokens into expert order and back: what surrounds the grouped matmul of a mixture of experts.

Nothing here asks the device how many tokens an expert got. Both directions and both gradients are
gathers: no two rows are added into one place, so they are deterministic without atomics.

Shapes: N tokens, K experts per token, P = N * K pairs or rows in expert order, E experts, D width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fathom.ops.registry import Impl, Implementations, choose, needs_triton, op, takes_all, wide

PERMUTE = Implementations(op="permute", refusals={"triton": needs_triton, "torch": takes_all})


class Permutation(NamedTuple):
    """Where each pair (token t, choice k), flat index ``t * K + k``, lies in expert order.

    Of pairs that have no row (:func:`without_last`), ``inverse`` is P or more.
    """

    order: Tensor  # [P] int64: row -> pair; rows of one expert keep the order of their pairs
    inverse: Tensor  # [N K] int64: pair -> row
    ends: Tensor  # [E] int32: one past each expert's last row
    counts: Tensor  # [E] int64: rows of each expert


def sort_by_expert(expert_ids_NK: Tensor, n_experts: int, *, impl: Impl = "auto") -> Permutation:
    """Sort the pairs by expert, stably and without a host synchronisation.

    Args:
        expert_ids_NK: integers from 0 to ``n_experts - 1``.
        n_experts: E, at most 32767.
        impl: ``triton`` is a counting sort, ``torch`` a radix sort.
    """
    flat_P = expert_ids_NK.flatten()
    if choose(PERMUTE, impl, flat_P) == "triton":
        return Permutation(*_counting_sort(flat_P, n_experts))
    return _radix_sort(flat_P, n_experts)


def without_last(permutation: Permutation, n_rows: int) -> Permutation:
    """Without the rows of the last expert, to which the absent pairs went; ``n_rows`` are left."""
    order, inverse, ends, counts = permutation
    return Permutation(order[:n_rows], inverse, ends[:-1], counts[:-1])


def _radix_sort(ids_P: Tensor, n_experts: int) -> Permutation:
    narrow = torch.uint8 if n_experts <= 256 else torch.int16  # a radix sort passes over every byte
    experts, order = ids_P.to(narrow).sort(stable=True)
    rows = torch.arange(order.shape[0], device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    each = torch.arange(n_experts, device=order.device, dtype=narrow)
    ends = torch.searchsorted(experts, each, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return Permutation(order, inverse, ends.to(torch.int32), counts)


def _fake_sort(ids_P: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, experts = (ids_P.new_empty(n, dtype=torch.int64) for n in (len(ids_P), n_experts))
    return pairs, torch.empty_like(pairs), experts.to(torch.int32), experts


@op("sort_by_expert", fake=_fake_sort, flops=lambda *_: 0)
def _counting_sort(ids_P: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fathom.ops.triton.permute import sort_by_expert as kernel

    return kernel(ids_P, n_experts)


def gather(x_ND: Tensor, permutation: Permutation, top_k: int) -> Tensor:
    """Each token's row, copied to its ``top_k`` places in expert order: ``[P, D]``."""
    return _Gather.apply(x_ND, permutation.order, permutation.inverse, top_k)


def combine(y_PD: Tensor, gates_NK: Tensor, permutation: Permutation) -> Tensor:
    """``out[t] = sum_k gates[t, k] * y[inverse[t * K + k]]``: ``[N, D]`` in y's dtype.

    Products and sums are in float32 (float64 for float64), rounded once.
    """
    return _Combine.apply(y_PD, gates_NK, permutation.order, permutation.inverse)


def gather_rows(x_ND: Tensor, order_P: Tensor, inverse_P: Tensor, top_k: int) -> Tensor:
    """:func:`gather` without a gradient; a kernel may want the way back instead of the order."""
    return x_ND.index_select(0, order_P // top_k)


def gather_sum(y_PD: Tensor, rows_NK: Tensor, gates_NK: Tensor | None = None) -> Tensor:
    """``out[n] = sum_k gates[n, k] * y[rows[n, k]]``; without gates the plain sum.

    A row that y does not have counts as zeros.
    """
    dtype = wide(y_PD.dtype)
    if rows_NK.numel() != y_PD.shape[0]:
        y_PD = torch.cat([y_PD, y_PD.new_zeros(1, y_PD.shape[1])])
        rows_NK = rows_NK.clamp(max=y_PD.shape[0] - 1)
    gates_NK = None if gates_NK is None else gates_NK.to(dtype)
    if y_PD.device.type == "cpu" and y_PD.dtype == dtype:  # one pass, 6 times faster
        return embedding_bag(rows_NK, y_PD, mode="sum", per_sample_weights=gates_NK)
    picked_NKD = y_PD.index_select(0, rows_NK.flatten()).unflatten(0, rows_NK.shape).to(dtype)
    if gates_NK is not None:
        picked_NKD = picked_NKD * gates_NK[..., None]
    return picked_NKD.sum(dim=1).to(y_PD.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x_ND.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_PD,) = grad_outputs
        (inverse,) = ctx.saved_tensors
        return gather_sum(grad_PD, inverse.view(-1, ctx.top_k)), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, gates_NK: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, gates_NK, order)
        return gather_sum(y_PD, inverse.view(gates_NK.shape), gates_NK)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_ND,) = grad_outputs
        y_PD, gates_NK, order = ctx.saved_tensors
        dtype = wide(y_PD.dtype)
        grad_PD = grad_ND.index_select(0, order // gates_NK.shape[1]).to(dtype)
        gates_P = gates_NK.flatten().index_select(0, order).to(dtype)
        dgates_P = torch.zeros_like(gates_NK.flatten(), dtype=dtype)
        dgates_P.index_copy_(0, order, (grad_PD * y_PD).sum(-1))
        dy_PD = grad_PD.mul_(gates_P[:, None]).to(y_PD.dtype)
        return dy_PD, dgates_P.view(gates_NK.shape).to(gates_NK.dtype), None, None
