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
        target_M1 = logits_MV.gather(1, at_M1)
        norm_M1 = logits_MV.sub_(top_M1).exp_().sum(-1, keepdim=True)
        logits_MV.scatter_add_(1, at_M1, -norm_M1)
        return (top_M1 + norm_M1.log() - target_M1).squeeze(1), norm_M1
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
    return loss, x_ND.new_empty(x_ND.shape if dx else 0), w_VD.new_empty(w_VD.shape if dw else 0)


def _flops(
    x: Sequence[int],
    w: Sequence[int],
    targets: Any,
    max_bytes: int,
    ignore: int,
    dx: bool,
    dw: bool,
) -> int:
    return 2 * x[0] * w[0] * w[1] * (1 + dx + dw)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.wants = inputs[5:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = (
        scaled(gradient, grad) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wants, strict=True)
    )
    return dx, dw, None, None, None, None, None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product in the gradient's dtype, the factor not rounded to it first."""
    return torch.mul(gradient, factor.reshape(1, 1), out=torch.empty_like(gradient))


def _chunk(
    x_MD: Tensor, w_VD: Tensor, targets_M: Tensor, valid_M: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and gradients of a few rows; their logits are freed on return."""
    logits_MV = x_MD @ w_VD.T
    losses_M, norm_M1 = losses_and_slopes(logits_MV, targets_M)
    weight_M1 = (valid_M[:, None] / norm_M1).to(x_MD.dtype)
    dx_MD = (logits_MV @ w_VD).mul_(weight_M1) if need_dx else None
    dw_VD = logits_MV.T @ (x_MD * weight_M1) if need_dw else None
    return (losses_M * valid_M).sum(), dx_MD, dw_VD


def loss_and_gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    max_bytes: int,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients, of no elements where they are not needed."""
    rows = rows_per_chunk(x_ND, w_VD, max_bytes)
    valid_N = targets_N != ignore_index
    rows_of = (t.split(rows) for t in (x_ND, targets_N.where(valid_N, 0), valid_N))
    loss, dx_parts, dw_VD = x_ND.new_zeros((), dtype=wide(x_ND.dtype)), [], None
    for x_MD, targets_M, valid_M in zip(*rows_of, strict=True):
        part, dx_MD, part_VD = _chunk(x_MD, w_VD, targets_M, valid_M, need_dx, need_dw)
        loss += part
        dx_parts.append(dx_MD)
        if part_VD is not None:
            dw_VD = part_VD if dw_VD is None else dw_VD.to(wide(w_VD.dtype)).add_(part_VD)
    dx_ND = torch.cat(dx_parts) if need_dx else x_ND.new_empty(0)
    return loss, dx_ND, w_VD.new_empty(0) if dw_VD is None else dw_VD.to(w_VD.dtype)


_linear_cross_entropy = op(
    "linear_cross_entropy", fake=_fake_sum, flops=_flops, setup=_setup, backward=_backward
)(loss_and_gradients)
