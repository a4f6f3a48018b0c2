"""Attention over selected tokens, one key head whose first channels are the values: MLA, absorbed.

The case of ``ops.block_attention`` that DSA needs: blocks of one token, one selection for all
heads, keys and values in one row that is gathered once.

Shapes: B batch, T queries, S keys, H heads, F key width, C value width, N selected tokens.
"""

from typing import Any

import torch
from torch import Tensor

from fathom.ops.block_attention import block_attention, masked_refusal
from fathom.ops.indexer import rows_of_all
from fathom.ops.registry import Impl, Implementations, autocast, choose, op, takes_all

MAX_NUMBERS = 2**31  # of a row's keys, in training of all: what an int32 offset reaches


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernel needs of queries, keys, values and selected tokens."""
    if device != "cuda":
        return f"it needs CUDA tensors, got {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {dtype}"
    if any(t.numel() == 0 for t in tensors):
        return f"it needs queries, keys and tokens, got shapes {[tuple(t.shape) for t in tensors]}"
    if tensors:
        return _shape_refusal(tensors[1], tensors[2])
    return ""


def _shape_refusal(k_BSF: Tensor, v_BSC: Tensor) -> str:
    widths = v_BSC.shape[-1], k_BSF.shape[-1] - v_BSC.shape[-1]
    if any(width < 16 or width & (width - 1) for width in widths):
        return f"it needs a latent and a rotated part of 16, 32, 64, ... channels, got {widths}"
    if (numbers := (k_BSF if k_BSF.requires_grad else k_BSF[:1]).numel()) >= MAX_NUMBERS:
        return f"it needs keys of fewer than 2**31 numbers, got {numbers}"
    return ""


TOKEN_ATTENTION = Implementations(
    op="token_attention",
    refusals={"triton": triton_refusal, "torch": masked_refusal, "reference": takes_all},
)


def token_attention(
    q_BTHF: Tensor,
    k_BSF: Tensor,
    selected_BTN: Tensor,
    *,
    value_dim: int,
    scale: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """One softmax over each query's selected tokens, ``[B, T, H, C]``, and its log-sum-exp.

    Args:
        q_BTHF: queries.
        k_BSF: keys; the values are their first ``value_dim`` channels.
        selected_BTN: int32, distinct tokens that the query may see; -1 for none, in any place.
        value_dim: C.
        scale: what a score is multiplied by.
        impl: which implementation.

    The softmax is in float32 (float64 for float64), the result in q's dtype. A query without a
    token gives zeros and passes no gradient back. The log-sum-exp is ``[B, T, H]`` in base 2, not
    differentiable, ``inf`` where there is no token; None where an implementation does not have it.

    Raises:
        ValueError: a refused ``impl``.
    """
    q_BTHF, k_BSF = autocast(q_BTHF, k_BSF)
    v_BSC = k_BSF[..., :value_dim]
    if choose(TOKEN_ATTENTION, impl, q_BTHF, k_BSF, v_BSC, selected_BTN) == "triton":
        return _token_attention(q_BTHF, k_BSF, selected_BTN, value_dim, scale)
    places_BT = selected_BTN.new_full(selected_BTN.shape[:2], k_BSF.shape[1])
    out_BTHC = block_attention(
        q_BTHF,
        k_BSF[:, :, None],
        v_BSC[:, :, None],
        selected_BTN[:, :, None],
        places_BT,
        block_size=1,
        scale=scale,
        impl=impl,
    )
    return out_BTHC, None


def _fake(
    q: Tensor, k: Tensor, selected: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BTHF, k_BSF, selected_BTN, _, ctx.scale = inputs
    ctx.save_for_backward(q_BTHF, k_BSF, selected_BTN, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BTHC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_BTHF, k_BSF, selected_BTN, out_BTHC, lse_BTH = ctx.saved_tensors
    dq_BTHF, dk_BSF = _token_attention_backward(
        grad_BTHC, q_BTHF, k_BSF, selected_BTN, out_BTHC, lse_BTH, ctx.scale
    )
    return dq_BTHF, dk_BSF, None, None, None


@op(
    "token_attention_backward",
    fake=lambda grad, q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
    flops=lambda grad, q, k, selected, *_: (
        2 * q[0] * q[1] * q[2] * selected[2] * (3 * q[3] + 2 * grad[3])
    ),
)
def _token_attention_backward(
    grad_BTHC: Tensor,
    q_BTHF: Tensor,
    k_BSF: Tensor,
    selected_BTN: Tensor,
    out_BTHC: Tensor,
    lse_BTH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from fathom.ops.triton import token_attention as kernel

    dq_MHF, dk_SF = kernel.backward(
        grad_BTHC.flatten(0, 1).contiguous(),
        q_BTHF.flatten(0, 1).contiguous(),
        k_BSF.flatten(0, 1).contiguous(),
        rows_of_all(k_BSF, selected_BTN),
        out_BTHC.flatten(0, 1),
        lse_BTH.flatten(0, 1),
        scale,
    )
    return dq_MHF.view(q_BTHF.shape), dk_SF.view(k_BSF.shape)


@op(
    "token_attention",
    fake=_fake,
    flops=lambda q, k, selected, value_dim, scale: (
        2 * q[0] * q[1] * q[2] * selected[2] * (q[3] + value_dim)
    ),
    setup=_setup,
    backward=_backward,
)
def _token_attention(
    q_BTHF: Tensor, k_BSF: Tensor, selected_BTN: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The mix, and the log-sum-exp of each query's scores in base 2."""
    from fathom.ops.triton import token_attention as kernel

    return kernel.forward(q_BTHF.contiguous(), k_BSF, selected_BTN, value_dim, scale)
