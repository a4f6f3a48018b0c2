"""Cross-entropy of ``x @ w^T`` without holding all logits: the loss of a large vocabulary.

Rows are taken in chunks whose logits fit in ``max_bytes``. When training, a chunk's gradients are
computed at once, while its logits are there: three matmuls in all, nothing recomputed.

Shapes: N tokens, V vocabulary, D width.
"""

import torch
from torch import Tensor

from fathom.ops.registry import autocast, op


def linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    *,
    max_bytes: int = 2**30,
    ignore_index: int = -100,
) -> Tensor:
    """The *sum* of ``-log softmax(x w^T)[target]`` over targets that are not ``ignore_index``.

    A scalar in float32 (float64 for float64). At most ``max_bytes`` of logits exist at a time (one
    row at least).
    """
    x_ND, w_VD = autocast(x_ND, w_VD)
    train = torch.is_grad_enabled() and (x_ND.requires_grad or w_VD.requires_grad)
    return _linear_cross_entropy(x_ND, w_VD, targets_N, max_bytes, ignore_index, train)[0]


def token_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    *,
    max_bytes: int = 2**30,
    ignore_index: int = -100,
) -> Tensor:
    """``-log softmax(x w^T)[target]`` of every token in nats, ``[N]`` float32, 0 where ignored.

    For evaluation: not differentiable.
    """
    x_ND, w_VD = autocast(x_ND.detach(), w_VD.detach())
    return _token_cross_entropy(x_ND, w_VD, targets_N, max_bytes, ignore_index)


def rows_per_chunk(x_ND: Tensor, w_VD: Tensor, max_bytes: int) -> int:
    """How many rows' logits fit: one copy in x's dtype and one in float32 or wider."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    row = w_VD.shape[0] * (x_ND.dtype.itemsize + wide.itemsize)
    return max(1, max_bytes // row)


def _fake_tokens(x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, max_bytes: int, ignore_index: int):
    return x_ND.new_empty(x_ND.shape[0], dtype=torch.promote_types(x_ND.dtype, torch.float32))


def _token_flops(x, w, *_, out_shape, **__) -> int:
    return 2 * x[0] * w[0] * w[1]


@op("token_cross_entropy", fake=_fake_tokens, flops=_token_flops)
def _token_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, max_bytes: int, ignore_index: int
) -> Tensor:
    losses_N = _fake_tokens(x_ND, w_VD, targets_N, max_bytes, ignore_index)
    rows = rows_per_chunk(x_ND, w_VD, max_bytes)
    for a in range(0, x_ND.shape[0], rows):
        logits = x_ND[a : a + rows] @ w_VD.T
        losses_N[a : a + rows] = torch.nn.functional.cross_entropy(
            logits.to(losses_N.dtype),
            targets_N[a : a + rows],
            ignore_index=ignore_index,
            reduction="none",
        )
    return losses_N


def _fake_sum(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    max_bytes: int,
    ignore_index: int,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_ND.new_empty((), dtype=torch.promote_types(x_ND.dtype, torch.float32))
    if not train:
        return loss, x_ND.new_empty(0), w_VD.new_empty(0)
    return loss, x_ND.new_empty(x_ND.shape), w_VD.new_empty(w_VD.shape)


def _sum_flops(x, w, targets, max_bytes, ignore_index, train, *, out_shape, **_) -> int:
    return (6 if train else 2) * x[0] * w[0] * w[1]


def _setup(ctx, inputs, output) -> None:
    _, dx_ND, dw_VD = output
    ctx.save_for_backward(dx_ND, dw_VD)
    ctx.mark_non_differentiable(dx_ND, dw_VD)


def _backward(ctx, grad: Tensor, *_):
    dx_ND, dw_VD = ctx.saved_tensors
    return dx_ND * grad.to(dx_ND.dtype), dw_VD * grad.to(dw_VD.dtype), None, None, None, None


@op("linear_cross_entropy", fake=_fake_sum, flops=_sum_flops, setup=_setup, backward=_backward)
def _linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    max_bytes: int,
    ignore_index: int,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    if not train:
        losses_N = _token_cross_entropy(x_ND, w_VD, targets_N, max_bytes, ignore_index)
        return losses_N.sum(), x_ND.new_empty(0), w_VD.new_empty(0)
    loss = x_ND.new_zeros((), dtype=wide)
    dx_ND = x_ND.new_empty(x_ND.shape)
    dw_VD = w_VD.new_zeros(w_VD.shape, dtype=wide)
    rows = rows_per_chunk(x_ND, w_VD, max_bytes)
    for a in range(0, x_ND.shape[0], rows):
        x, targets = x_ND[a : a + rows], targets_N[a : a + rows]
        valid = targets != ignore_index
        at = targets.where(valid, 0)[:, None]
        log_p = torch.log_softmax(x @ w_VD.T, dim=-1, dtype=wide)
        loss -= (log_p.gather(1, at)[:, 0] * valid).sum()
        grad = log_p.exp_().scatter_add_(1, at, -torch.ones_like(log_p[:, :1]))
        grad = (grad * valid[:, None]).to(x.dtype)
        torch.mm(grad, w_VD, out=dx_ND[a : a + rows])
        dw_VD += grad.T @ x
    return loss, dx_ND, dw_VD.to(w_VD.dtype)
