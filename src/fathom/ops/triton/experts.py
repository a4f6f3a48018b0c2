"""The backward's first product and the SwiGLU's gradient in one kernel.

``da = dy W_down`` meets the pre-activation while it is in registers, so the gradient of the
activation is never written, and the gates' gradient needs no expert's answer: ``<da, a>``
(SonicMoE, arXiv:2512.14080). Programs take tiles of one expert each, in groups of rows that share
the weight in L2. The accumulator is finished in quarters, each small enough for its epilogue.

Shapes: P rows in expert order, D model dim, E experts, I one expert's inner dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P, BLOCK_I, BLOCK_D, GROUP = 128, 128, 64, 8
FUSED_DIM = 4096


@triton.jit
def _tile_of(
    program,
    ends_E,
    experts,
    columns,
    BLOCK_P: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The expert, first row, one past its last row and column tile of a program; -1: none.

    Programs are numbered expert by expert, and within one by groups of ``GROUP`` row tiles.
    """
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends_E + e, mask=e < experts, other=0)
    start = tl.load(ends_E + e - 1, mask=(e < experts) & (e > 0), other=0)
    tiles = (end - start + BLOCK_P - 1) // BLOCK_P * columns
    first = tl.cumsum(tiles, axis=0) - tiles
    mine = (first <= program) & (program < first + tiles)
    expert = tl.max(tl.where(mine, e, -1), axis=0)
    place = program - tl.max(tl.where(mine, first, 0), axis=0)
    start = tl.max(tl.where(mine, start, 0), axis=0)
    end = tl.max(tl.where(mine, end, 0), axis=0)
    group = place // (GROUP * columns)
    height = tl.minimum((end - start + BLOCK_P - 1) // BLOCK_P - group * GROUP, GROUP)
    height = tl.maximum(height, 1)  # where there is no tile
    inside = place - group * GROUP * columns
    row = start + (group * GROUP + inside % height) * BLOCK_P
    return expert, row, end, inside // height


@triton.jit
def _finish(da, first, row, real, weight, h_P2I, dh_P2I, a_PI, inner, WIDTH: tl.constexpr):
    """Columns ``first`` to ``first + WIDTH`` of the tile; their part of the gates' gradient."""
    column = first + tl.arange(0, WIDTH)
    inside = real[:, None] & (column < inner)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * inner) + column[None, :]
    gate = tl.load(h_P2I + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_P2I + at + inner, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dweight = tl.sum(da * silu * up, axis=1)
    da *= weight[:, None]
    dgate = da * up * (sigmoid + silu * (1 - sigmoid))
    narrow = dh_P2I.dtype.element_ty
    tl.store(dh_P2I + at, dgate.to(narrow), mask=inside)
    tl.store(dh_P2I + at + inner, (da * silu).to(narrow), mask=inside)
    to = a_PI + row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(to, (silu * up * weight[:, None]).to(narrow), mask=inside)
    return dweight


@triton.jit
def _down_backward(
    dy_PD,
    w_down_EDI,
    ends_E,
    h_P2I,
    gates_P,
    order_P,
    dh_P2I,
    a_PI,
    dgates_JP,  # a row for each of the J column tiles
    rows,
    experts,
    dim,
    inner,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert, first_row, last, tile = _tile_of(
        tl.program_id(0), ends_E, experts, columns, BLOCK_P, GROUP, EXPERTS
    )
    if expert >= 0:
        row = first_row + tl.arange(0, BLOCK_P)
        real = row < last
        column = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        depth = tl.arange(0, BLOCK_D)
        dy = dy_PD + row.to(tl.int64)[:, None] * dim + depth[None, :]
        w = w_down_EDI + expert.to(tl.int64) * dim * inner
        w += depth[:, None] * inner + column[None, :]
        total = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
        for done in range(0, dim, BLOCK_D):
            inside = depth < dim - done
            x = tl.load(dy, mask=real[:, None] & inside[None, :], other=0.0)
            y = tl.load(w, mask=inside[:, None] & (column < inner)[None, :], other=0.0)
            total = tl.dot(x, y, total, input_precision="ieee")
            dy += BLOCK_D
            w += BLOCK_D * inner
        pair = tl.load(order_P + row, mask=real, other=0)
        weight = tl.load(gates_P + pair, mask=real, other=0.0).to(tl.float32)
        begin = tile * BLOCK_I
        QUARTER: tl.constexpr = BLOCK_I // 4
        left, right = total.reshape(BLOCK_P, 2, BLOCK_I // 2).permute(0, 2, 1).split()
        a, b = left.reshape(BLOCK_P, 2, QUARTER).permute(0, 2, 1).split()
        dweight = _finish(a, begin, row, real, weight, h_P2I, dh_P2I, a_PI, inner, QUARTER)
        begin += QUARTER
        dweight += _finish(b, begin, row, real, weight, h_P2I, dh_P2I, a_PI, inner, QUARTER)
        begin += QUARTER
        c, d = right.reshape(BLOCK_P, 2, QUARTER).permute(0, 2, 1).split()
        dweight += _finish(c, begin, row, real, weight, h_P2I, dh_P2I, a_PI, inner, QUARTER)
        begin += QUARTER
        dweight += _finish(d, begin, row, real, weight, h_P2I, dh_P2I, a_PI, inner, QUARTER)
        tl.store(dgates_JP + tile.to(tl.int64) * rows + pair, dweight, mask=real)


def fusing_pays(dim: int) -> bool:
    """Whether :func:`down_backward` beats a plain product and a pass of its own.

    It saves a pass over ``[P, I]`` and multiplies more slowly than ``F.grouped_mm``, so it pays
    where the product is short.
    """
    return dim <= FUSED_DIM


def down_backward(
    dy_PD: Tensor,
    w_down_EDI: Tensor,
    ends_E: Tensor,
    h_P2I: Tensor,
    gates_P: Tensor,
    order_P: Tensor,
    *,
    blocks: tuple[int, int, int] = (BLOCK_P, BLOCK_I, BLOCK_D),
    num_warps: int = 8,
    num_stages: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dh, dgates, a)``, as the product and ``ops.swiglu.swiglu_backward`` give."""
    (rows, dim), (experts, _, inner) = dy_PD.shape, w_down_EDI.shape
    block_p, block_i, block_d = blocks
    columns = triton.cdiv(inner, block_i)
    dh_P2I, a_PI = torch.empty_like(h_P2I), h_P2I.new_empty(rows, inner)
    dgates_JP = gates_P.new_empty(columns, rows, dtype=torch.float32)
    tiles = triton.cdiv(rows, block_p) + experts  # at most: each expert's last tile may be short
    if rows:
        _down_backward[(tiles * columns,)](
            dy_PD,
            w_down_EDI,
            ends_E,
            h_P2I,
            gates_P,
            order_P,
            dh_P2I,
            a_PI,
            dgates_JP,
            rows,
            experts,
            dim,
            inner,
            columns,
            BLOCK_P=block_p,
            BLOCK_I=block_i,
            BLOCK_D=block_d,
            GROUP=GROUP,
            EXPERTS=max(128, triton.next_power_of_2(experts)),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return dh_P2I, dgates_JP.sum(0), a_PI
