"""Softmax attention with grouped keys and values: ``softmax(scale * q k^T + mask) v``.

Shapes: B batch, T queries, S keys, H query heads, G key-value heads, Q query and key width, V value
width. Query head ``h`` reads key-value head ``h // (H / G)``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import sdpa_backward_flop, sdpa_flop

from fathom.ops.registry import (
    Impl,
    Implementations,
    choose,
    count_flops_if_torch_does_not,
    no_kernel_yet,
    runs_anywhere,
)

ATTENTION = Implementations(
    op="attention",
    refusals={"triton": no_kernel_yet, "torch": runs_anywhere, "reference": runs_anywhere},
)
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Mix the values that each query may see; returns ``[B, T, H, V]`` in q's dtype.

    Args:
        scale: what the scores are multiplied by.
        mask: broadcastable to ``[B, H, T, S]``: bool (True: visible) or float (added to the scores).
        causal: query t sees keys 0..t; needs T == S and no mask.

    A query that sees nothing gets zeros and sends no gradient. Softmax is in float32 (float64 for
    float64).
    """
    _, length, heads, _ = q_BTHQ.shape
    if heads % k_BSGQ.shape[2]:
        raise ValueError(
            f"{heads} query heads do not divide over {k_BSGQ.shape[2]} key-value heads"
        )
    if causal and (mask is not None or length != k_BSGQ.shape[1]):
        raise ValueError(
            f"causal=True needs as many keys as queries and no mask, got {length} queries and "
            f"{k_BSGQ.shape[1]} keys; pass a mask instead"
        )
    run = attention_reference
    if choose(ATTENTION, impl, q_BTHQ, k_BSGQ, v_BSGV) == "torch":
        run = torch_attention
    return run(q_BTHQ, k_BSGQ, v_BSGV, scale=scale, mask=mask, causal=causal)


def attention_reference(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The definition: all scores in memory."""
    wide = torch.promote_types(q_BTHQ.dtype, torch.float32)
    share = q_BTHQ.shape[2] // k_BSGQ.shape[2]
    q, k, v = q_BTHQ.to(wide), k_BSGQ.to(wide), v_BSGV.to(wide)
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores_BHTS = scale * torch.einsum("bthq,bshq->bhts", q, k)
    if causal:
        mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        mask, sees = never_empty(mask)
        if mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
        else:
            scores_BHTS = scores_BHTS + mask
        scores_BHTS = scores_BHTS.softmax(dim=-1) * sees
    else:
        scores_BHTS = scores_BHTS.softmax(dim=-1)
    return torch.einsum("bhts,bshv->bthv", scores_BHTS, v).to(q_BTHQ.dtype)


def torch_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``."""
    q, k, v = q_BTHQ.transpose(1, 2), k_BSGQ.transpose(1, 2), v_BSGV.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    sees = None
    if mask is not None:
        mask, sees = never_empty(mask)
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
    if q.is_cuda:
        with sdpa_kernel(FASTEST_FIRST, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
            )
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    if sees is not None:
        out = out * sees
    return out.transpose(1, 2)


def never_empty(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with blind queries made to see everything, and ``sees`` ``[..., T, 1]``, False there.

    No softmax then divides by zero, in any kernel; multiplying by ``sees`` gives the zeros.
    """
    if mask.dtype == torch.bool:
        sees = mask.any(dim=-1, keepdim=True)
        return mask | ~sees, sees
    sees = (mask > float("-inf")).any(dim=-1, keepdim=True)
    return mask.masked_fill(~sees, 0.0), sees


count_flops_if_torch_does_not(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)
count_flops_if_torch_does_not(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop
)
