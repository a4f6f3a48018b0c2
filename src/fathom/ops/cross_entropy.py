"""Cross-entropy of ``x @ w^T`` without all logits in memory: the loss over a large vocabulary.

Rows are taken in chunks whose logits fit in ``max_bytes``. When training, a chunk's gradients are
computed while its logits are there (they become the gradient, in place), so there are three matmuls
and nothing is computed twice; the backward only scales.

Shapes: N tokens, M tokens of a chunk, V vocabulary, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fathom.ops.registry import autocast, op, wide

CPU_ROWS = 512  # measured: logits stay in cache, matmuls stay wide
SLICES = 8  # of a chunk in a narrow dtype; only one of them is widened at a time


def linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    *,
    max_bytes: int = 2**30,
    ignore_index: int = -100,
) -> Tensor:
    """The *sum* of ``-log softmax(x w^T)[target]`` over the targets that are not ``ignore_index``.

    A scalar in float32 (float64 for float64). At most ``max_bytes`` of logits, or one row of them,
    exist at a time.
    """
    x_ND, w_VD = autocast(x_ND, w_VD)
    training = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy(
        x_ND,
        w_VD,
        targets_N,
        max_bytes,
        ignore_index,
        training and x_ND.requires_grad,
        training and w_VD.requires_grad,
    )
    return loss


def token_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    *,
    max_bytes: int = 2**30,
    ignore_index: int = -100,
) -> Tensor:
    """``-log softmax(x w^T)[target]`` of each token in nats, ``[N]``, 0 where it is ignored.

    For evaluation, without a gradient. Float32 (float64 for float64); memory as above.
    """
    x_ND, w_VD = autocast(x_ND.detach(), w_VD.detach())
    return _token_cross_entropy(x_ND, w_VD, targets_N, max_bytes, ignore_index)


def rows_per_chunk(x_ND: Tensor, w_VD: Tensor, max_bytes: int) -> int:
    """How many rows' logits fit, the widened slice of a narrow dtype included."""
    row = w_VD.shape[0] * x_ND.dtype.itemsize
    if x_ND.dtype != wide(x_ND.dtype):
        row += w_VD.shape[0] * wide(x_ND.dtype).itemsize // SLICES
    rows = max_bytes // row
    if x_ND.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    return max(1, rows // 128 * 128 if rows > 128 else rows)


def losses_and_slopes(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into their gradient, in place: ``(losses_M, norm_M1)``.

    What is left in ``logits_MV``, divided by ``norm_M1``, is ``softmax - one_hot(target)``.
    """
    at_M1 = targets_M[:, None]
    if logits_MV.dtype == wide(logits_MV.dtype):
        top_M1 = logits_MV.amax(-1, keepdim=True)
        target_M1 = logits_MV.gather(1, at_M1) - top_M1
        norm_M1 = logits_MV.sub_(top_M1).exp_().sum(-1, keepdim=True)
        logits_MV.scatter_(1, at_M1, target_M1.exp() - norm_M1)
        return (norm_M1.log() - target_M1).squeeze(1), norm_M1
    losses = []
    rows = -(-logits_MV.shape[0] // SLICES)
    for part, at in zip(logits_MV.split(rows), at_M1.split(rows), strict=True):
        log_p = part.log_softmax(-1, dtype=wide(part.dtype))
        loss_M1 = -log_p.gather(1, at)
        torch.exp(log_p, out=part)
        part.scatter_(1, at, torch.expm1(-loss_M1).to(part.dtype))
        losses.append(loss_M1)
    losses_M1 = torch.cat(losses)
    return losses_M1.squeeze(1), torch.ones_like(losses_M1)


def _fake_tokens(x_ND: Tensor, *_: Any) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], dtype=wide(x_ND.dtype))


@op(
    "token_cross_entropy",
    fake=_fake_tokens,
    flops=lambda x, w, *_: 2 * x[0] * w[0] * w[1],
)
def _token_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, max_bytes: int, ignore_index: int
) -> Tensor:
    rows = rows_per_chunk(x_ND, w_VD, max_bytes)
    valid_N = targets_N != ignore_index
    targets_N = targets_N.where(valid_N, 0)
    chunks = zip(x_ND.split(rows), targets_N.split(rows), strict=True)
    losses_N = torch.cat([losses_and_slopes(x @ w_VD.T, targets)[0] for x, targets in chunks])
    return losses_N * valid_N


def _fake_sum(
    x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, max_bytes: int, ignore: int, dx: bool, dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_ND.new_empty((), dtype=wide(x_ND.dtype))
    return loss, x_ND.new_empty(x_ND.shape if dx else 0), w_VD.new_empty(w_VD.mT.shape if dw else 0)


def _flops(
    x: Sequence[int],
    w: Sequence[int],
    targets: Sequence[int],
    max_bytes: int,
    ignore: int,
    dx: bool,
    dw: bool,
) -> int:
    return 2 * x[0] * w[0] * w[1] * (1 + dx + dw)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.need_dx, ctx.need_dw = inputs[5:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx_ND, dw_DV = ctx.saved_tensors
    dx = scaled(dx_ND, grad) if ctx.need_dx else None
    dw = scaled(dw_DV.T, grad) if ctx.need_dw else None
    return dx, dw, None, None, None, None, None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product, contiguous, in the gradient's dtype; the factor is not rounded to that first."""
    out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return torch.mul(gradient, factor.reshape(1, 1), out=out)


def _chunk(
    x_MD: Tensor, w_VD: Tensor, targets_M: Tensor, valid_M: Tensor, dx_MD: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of a few rows and its ``dw_DV``; ``dx_MD`` is written if it has elements.

    The rows' logits are freed on return.
    """
    logits_MV = x_MD @ w_VD.T
    losses_M, norm_M1 = losses_and_slopes(logits_MV, targets_M)
    weight_M1 = (valid_M[:, None] / norm_M1).to(x_MD.dtype)
    if dx_MD.numel():
        torch.mm(logits_MV, w_VD, out=dx_MD).mul_(weight_M1)
    dw_DV = (x_MD * weight_M1).T @ logits_MV if need_dw else None  # faster than [V, D] on the CPU
    return (losses_M * valid_M).sum(), dw_DV


def loss_and_gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    max_bytes: int,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, ``dx_ND`` and ``dw_DV``; a gradient that is not needed has no elements."""
    loss, dx_ND, no_dw = _fake_sum(x_ND, w_VD, targets_N, max_bytes, ignore_index, need_dx, False)
    loss.zero_()
    dw_DV = None
    valid_N = targets_N != ignore_index
    targets_N = targets_N.where(valid_N, 0)
    rows = rows_per_chunk(x_ND, w_VD, max_bytes)
    for a in range(0, max(x_ND.shape[0], 1), rows):
        m = slice(a, a + rows)
        part, part_DV = _chunk(x_ND[m], w_VD, targets_N[m], valid_N[m], dx_ND[m], need_dw)
        loss += part
        if part_DV is not None:
            dw_DV = part_DV if dw_DV is None else dw_DV.to(wide(w_VD.dtype)).add_(part_DV)
    return loss, dx_ND, no_dw if dw_DV is None else dw_DV.to(w_VD.dtype)


_linear_cross_entropy = op(
    "linear_cross_entropy", fake=_fake_sum, flops=_flops, setup=_setup, backward=_backward
)(loss_and_gradients)
