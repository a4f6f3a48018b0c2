"""Kernels of the gated SwiGLU between an expert layer's two products, forward and backward.

Shapes: P rows in expert order, I one expert's inner width; ``h_P2I`` holds gate, then up channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # of a tile


@triton.jit(do_not_specialize=["rows"])
def _forward(h_P2I, gates_P, order_P, a_PI, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    pair = tl.load(order_P + row, mask=row < rows, other=0)
    weight = tl.load(gates_P + pair, mask=row < rows, other=0.0).to(tl.float32)
    at = h_P2I + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    a = gate * tl.sigmoid(gate) * up * weight[:, None]
    to = a_PI + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, a.to(a_PI.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    h_P2I,
    gates_P,
    order_P,
    da_PI,  # in: the gradient; out: the gated activation
    dh_P2I,
    dgates_P,
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    pair = tl.load(order_P + row, mask=real, other=0)
    weight = tl.load(gates_P + pair, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS], tl.float32)
    wide = row.to(tl.int64)[:, None]
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (column < width)[None, :]
        at = wide * (2 * width) + column[None, :]
        gate = tl.load(h_P2I + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_P2I + at + width, mask=inside, other=0.0).to(tl.float32)
        there = da_PI + wide * width + column[None, :]
        da = tl.load(there, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dweight += tl.sum(da * silu * up, axis=1)
        da *= weight[:, None]
        dgate = da * up * (sigmoid + silu * (1 - sigmoid))
        a = silu * up * weight[:, None]
        tl.store(there, a.to(da_PI.dtype.element_ty), mask=inside)
        tl.store(dh_P2I + at, dgate.to(dh_P2I.dtype.element_ty), mask=inside)
        tl.store(dh_P2I + at + width, (da * silu).to(dh_P2I.dtype.element_ty), mask=inside)
    tl.store(dgates_P + pair, dweight, mask=real)


def swiglu(h_P2I: Tensor, gates_P: Tensor, order_P: Tensor) -> Tensor:
    """``a[p] = gates[order[p]] * silu(h[p, :I]) * h[p, I:]``, ``[P, I]``; h is contiguous."""
    gates_P = gates_P.contiguous()
    rows, width = h_P2I.shape[0], h_P2I.shape[1] // 2
    a_PI = h_P2I.new_empty(rows, width)
    if a_PI.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
        _forward[grid](h_P2I, gates_P, order_P, a_PI, rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return a_PI


def swiglu_backward(
    h_P2I: Tensor, gates_P: Tensor, order_P: Tensor, da_PI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dh, dgates, a)``, dgates float32; ``a``, the gated activation, overwrites ``da``.

    The gates of pairs that have no row get a gradient of 0.
    """
    gates_P, (rows, width) = gates_P.contiguous(), da_PI.shape
    dh_P2I = torch.empty_like(h_P2I)
    fill = torch.empty_like if gates_P.shape[0] == rows else torch.zeros_like
    dgates_P = fill(gates_P, dtype=torch.float32)
    if da_PI.numel():
        grid = (triton.cdiv(rows, ROWS),)
        tensors = (h_P2I, gates_P, order_P, da_PI, dh_P2I, dgates_P)
        _backward[grid](*tensors, rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return dh_P2I, dgates_P, da_PI
