"""Cross-entropy of ``x @ w^T`` without all logits in memory: the loss over a large vocabulary.

Rows are taken in chunks whose logits fit in ``max_bytes``. When training, a chunk's gradients are
computed while its logits are there (they become the gradient, in place), so there are three matmuls
and nothing is computed twice; the backward only scales. On a GPU one kernel does all that lies
between the matmuls.

Shapes: N tokens, M tokens of a chunk, V vocabulary, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fathom.ops.proof import PROVEN, random, settle
from fathom.ops.registry import (
    Impl,
    Implementations,
    autocast,
    choose,
    needs_triton,
    op,
    takes_all,
    wide,
)

CPU_ROWS = 512  # measured: logits stay in cache, matmuls stay wide
SLICES = 8  # of a chunk in a narrow dtype; only one of them is widened at a time
NARROW_SUMS = 4  # chunks that may be added up in a narrow dtype: at most twice the error


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernel needs: CUDA, and logits of at most float32."""
    if dtype == torch.float64:
        return f"it needs float32 or narrower, got {dtype}"
    return needs_triton(device, dtype)


CROSS_ENTROPY = Implementations(
    op="cross_entropy", refusals={"triton": triton_refusal, "torch": takes_all}
)


def linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    *,
    max_bytes: int = 2**30,
    ignore_index: int = -100,
    impl: Impl = "auto",
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
        _choose(impl, x_ND, w_VD),
    )
    return loss


def token_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    *,
    max_bytes: int = 2**30,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> Tensor:
    """``-log softmax(x w^T)[target]`` of each token in nats, ``[N]``, 0 where it is ignored.

    For evaluation, without a gradient. Float32 (float64 for float64); memory as above.
    """
    x_ND, w_VD = autocast(x_ND.detach(), w_VD.detach())
    chosen = _choose(impl, x_ND, w_VD)
    return _token_cross_entropy(x_ND, w_VD, targets_N, max_bytes, ignore_index, chosen)


def _choose(impl: Impl, x_ND: Tensor, w_VD: Tensor) -> str:
    chosen = choose(CROSS_ENTROPY, impl, x_ND, w_VD)
    return PROVEN if (impl, chosen) == ("auto", "triton") else chosen


def rows_per_chunk(x_ND: Tensor, w_VD: Tensor, max_bytes: int, impl: str) -> int:
    """How many rows' logits fit, with what ``torch`` widens of a narrow dtype."""
    row = w_VD.shape[0] * x_ND.dtype.itemsize
    if impl == "torch" and x_ND.dtype != wide(x_ND.dtype):
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
    x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, max_bytes: int, ignore_index: int, impl: str
) -> Tensor:
    impl = settle(impl, _check, x_ND.device)
    rows = rows_per_chunk(x_ND, w_VD, max_bytes, impl)
    if impl == "triton":
        from fathom.ops.triton.cross_entropy import losses_and_slopes as kernel

        losses_N, targets_N = _fake_tokens(x_ND), targets_N.contiguous()
        chunks = (t.split(rows) for t in (x_ND, targets_N, losses_N))
        for x, targets, losses in zip(*chunks, strict=True):
            kernel(x @ w_VD.T, targets, losses, ignore_index, slopes=False)
        return losses_N
    valid_N = targets_N != ignore_index
    targets_N = targets_N.where(valid_N, 0)
    chunks = zip(x_ND.split(rows), targets_N.split(rows), strict=True)
    losses_N = torch.cat([losses_and_slopes(x @ w_VD.T, targets)[0] for x, targets in chunks])
    return losses_N * valid_N


def _fake_sum(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    max_bytes: int,
    ignore: int,
    dx: bool,
    dw: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_ND.new_empty((), dtype=wide(x_ND.dtype))
    w = w_VD.mT if impl == "torch" else w_VD  # on the CPU [D, V] is faster
    return loss, x_ND.new_empty(x_ND.shape if dx else 0), w_VD.new_empty(w.shape if dw else 0)


def _flops(x: Sequence[int], w: Sequence[int], *others: Any) -> int:
    dx, dw = others[3:5]
    return 2 * x[0] * w[0] * w[1] * (1 + dx + dw)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.need_dx, ctx.need_dw, ctx.impl = inputs[5:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx_ND, dw = ctx.saved_tensors
    dx_ND = scaled(dx_ND, grad) if ctx.need_dx else None
    dw_VD = scaled(dw.T if ctx.impl == "torch" else dw, grad) if ctx.need_dw else None
    return dx_ND, dw_VD, *[None] * 6


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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, ``dx_ND`` and ``dw`` (``[D, V]`` for ``torch``, else ``[V, D]``).

    A gradient that is not needed has no elements.
    """
    limits = (max_bytes, ignore_index)
    if settle(impl, _check, x_ND.device) == "triton":
        return _by_kernel(x_ND, w_VD, targets_N, *limits, need_dx, need_dw)
    if impl != "torch":  # the kernel failed its proof
        plain = loss_and_gradients(x_ND, w_VD, targets_N, *limits, need_dx, need_dw, "torch")
        loss, dx_ND, dw_DV = plain
        return loss, dx_ND, dw_DV.mT.contiguous() if need_dw else dw_DV
    loss, dx_ND, no_dw = _fake_sum(x_ND, w_VD, targets_N, *limits, need_dx, False, impl)
    loss.zero_()
    dw_DV = None
    valid_N = targets_N != ignore_index
    targets_N = targets_N.where(valid_N, 0)
    rows = rows_per_chunk(x_ND, w_VD, max_bytes, impl)
    for a in range(0, max(x_ND.shape[0], 1), rows):
        m = slice(a, a + rows)
        part, part_DV = _chunk(x_ND[m], w_VD, targets_N[m], valid_N[m], dx_ND[m], need_dw)
        loss += part
        if part_DV is not None:
            dw_DV = part_DV if dw_DV is None else dw_DV.to(wide(w_VD.dtype)).add_(part_DV)
    return loss, dx_ND, no_dw if dw_DV is None else dw_DV.to(w_VD.dtype)


def _by_kernel(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    max_bytes: int,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`loss_and_gradients` where the kernel runs."""
    from fathom.ops.triton.cross_entropy import losses_and_slopes as kernel

    limits = (max_bytes, ignore_index)
    _, dx_ND, dw_VD = _fake_sum(x_ND, w_VD, targets_N, *limits, need_dx, need_dw, "triton")
    losses_N, targets_N = _fake_tokens(x_ND), targets_N.contiguous()
    tokens = x_ND.shape[0]
    chunks = -(-tokens // rows_per_chunk(x_ND, w_VD, max_bytes, "triton"))
    rows = -(-tokens // max(chunks, 1))
    rows = -(-rows // 128) * 128 if rows > 128 else max(rows, 1)  # chunks alike, of whole tiles
    sums = dw_VD if tokens else dw_VD.zero_()
    if need_dw and chunks > NARROW_SUMS:
        sums = torch.zeros_like(dw_VD, dtype=wide(dw_VD.dtype))
    for a in range(0, tokens, rows):
        m = slice(a, a + rows)
        logits_MV = x_ND[m] @ w_VD.T
        kernel(logits_MV, targets_N[m], losses_N[m], ignore_index, slopes=need_dx or need_dw)
        if need_dx:
            torch.mm(logits_MV, w_VD, out=dx_ND[m])
        if need_dw and chunks > NARROW_SUMS:
            sums += logits_MV.T @ x_ND[m]
        elif need_dw and a:
            sums.addmm_(logits_MV.T, x_ND[m])
        elif need_dw:
            torch.mm(logits_MV.T, x_ND[m], out=sums)
    return losses_N.sum(), dx_ND, sums.to(w_VD.dtype)


def _check(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The kernel's results on ``device``, and the definition's in float64."""
    x, w = random(200, 64, device=device), random(3000, 64, device=device) / 10
    targets = torch.arange(0, 3000, 15, device=device)
    targets[::7] = -100
    limits = (2**19, -100, True, True)  # a few chunks
    loss, dx, dw = _by_kernel(x, w, targets, *limits)
    want, want_dx, want_dw = loss_and_gradients(x.double(), w.double(), targets, *limits, "torch")
    yield from ((loss, want), (dx, want_dx), (dw, want_dw.mT))


_linear_cross_entropy = op(
    "linear_cross_entropy", fake=_fake_sum, flops=_flops, setup=_setup, backward=_backward
)(loss_and_gradients)
