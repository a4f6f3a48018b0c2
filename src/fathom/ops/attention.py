"""Softmax attention with shared keys and values: ``softmax(scale * q k^T + mask) v``.

``torch`` is the fastest of PyTorch's kernels that is right for the shape: on CUDA cuDNN's where it
takes it, on the CPU the flash kernel.

Shapes: B batch, T queries, S keys, H query heads, G key-value heads, Q query and key width, V value
width. Query head ``h`` reads key-value head ``h // (H / G)``.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fathom.ops.cpu_attention import cpu_attention, plain_cpu_attention
from fathom.ops.registry import (
    Impl,
    Implementations,
    autocast,
    choose,
    no_kernel,
    takes_all,
    wide,
)

FEW_QUERIES = 8  # decoding and a few drafted tokens


def torch_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernels of PyTorch need."""
    if any(t.numel() == 0 for t in tensors):
        return f"it needs queries and keys, got shapes {[tuple(t.shape) for t in tensors]}"
    if any(t.requires_grad for t in tensors[3:]):
        return "it needs a mask that wants no gradient"
    return ""


ATTENTION = Implementations(
    op="attention",
    refusals={"triton": no_kernel, "torch": torch_refusal, "reference": takes_all},
)


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
    """For each query the mean of the values it may see, weighted by softmax: ``[B, T, H, V]``.

    Args:
        q_BTHQ: queries.
        k_BSGQ: keys; G divides H.
        v_BSGV: values; V may differ from Q.
        scale: what a score is multiplied by.
        mask: broadcastable to ``[B, H, T, S]``: bool (True: visible) or float (added to a score).
        causal: query t sees keys 0 to t, a single query all; needs no mask, and T == S or T == 1.
        impl: which implementation; ``torch`` refuses empty inputs and masks that want a gradient.

    The softmax is in float32 (float64 for float64), the result in q's dtype. A query that sees
    nothing gives zeros and passes no gradient back.

    Raises:
        ValueError: G does not divide H, a ``causal`` that cannot be, a refused ``impl``.
    """
    q_BTHQ, k_BSGQ, v_BSGV = autocast(q_BTHQ, k_BSGQ, v_BSGV)
    check_heads(q_BTHQ, k_BSGQ)
    length = q_BTHQ.shape[1]
    if causal and (mask is not None or length not in (1, k_BSGQ.shape[1])):
        raise ValueError(
            f"causal=True needs as many keys as queries and no mask, got {length} queries and "
            f"{k_BSGQ.shape[1]} keys; say what is visible in mask instead"
        )
    causal = causal and length > 1
    masks = () if mask is None else (mask,)
    chosen = choose(ATTENTION, impl, q_BTHQ, k_BSGQ, v_BSGV, *masks)
    run = attention_reference if chosen == "reference" else torch_attention
    bias = None if mask is None else additive(mask, q_BTHQ.dtype)
    return run(q_BTHQ, k_BSGQ, v_BSGV, scale, bias, causal)


def check_heads(q_BTHQ: Tensor, k_BSGQ: Tensor) -> None:
    """Refuse query heads that the key heads cannot share equally.

    Raises:
        ValueError: G does not divide H.
    """
    heads, groups = q_BTHQ.shape[2], k_BSGQ.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads do not divide among {groups} key heads")


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores, ``[B or 1, H or 1, T or 1, S or 1]``."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, float("-inf")).to(dtype)
    return mask.to(dtype)


def sighted(bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias under which no softmax divides by zero, and which queries saw anything before.

    A blind query sees everything now; its output is to be multiplied by the second.
    """
    sees_BHT1 = (bias > float("-inf")).any(dim=-1, keepdim=True)
    return bias.masked_fill(~sees_BHT1, 0.0), sees_BHT1.transpose(1, 2)


def attention_reference(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The definition: all scores in memory, keys and values repeated for their query heads."""
    share = q_BTHQ.shape[2] // k_BSGQ.shape[2]
    q, k, v = (t.to(wide(t.dtype)) for t in (q_BTHQ, k_BSGQ, v_BSGV))
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores_BHTS = scale * torch.einsum("bthq,bshq->bhts", q, k)
    if causal:
        ones = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q.device)
        bias = additive(ones.tril(), q.dtype)
    if bias is None:
        return torch.einsum("bhts,bshv->bthv", scores_BHTS.softmax(-1), v).to(q_BTHQ.dtype)
    bias, sees_BTH1 = sighted(bias)
    weights_BHTS = (scores_BHTS + bias).softmax(-1)
    return (torch.einsum("bhts,bshv->bthv", weights_BHTS, v) * sees_BTH1).to(q_BTHQ.dtype)


def torch_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    scale: float,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    """The fastest kernel of PyTorch for these shapes."""
    unequal = q_BTHQ.shape[-1] != v_BSGV.shape[-1]
    shared = q_BTHQ.shape[2] != k_BSGQ.shape[2]
    few = unequal and shared and q_BTHQ.shape[1] <= FEW_QUERIES and not causal
    if q_BTHQ.device.type == "cpu" and not few:  # this kernel gives a blind query zeros by itself
        run = cpu_attention if unequal or torch.is_grad_enabled() else plain_cpu_attention
        return run(q_BTHQ, k_BSGQ, v_BSGV, bias, causal, scale)[0]
    sees_BTH1 = None
    if bias is not None:
        bias, sees_BTH1 = sighted(bias)
    if few:
        out_BTHV = few_queries(q_BTHQ, k_BSGQ, v_BSGV, scale, bias)
    else:
        out_BTHV = sdpa(q_BTHQ, k_BSGQ, v_BSGV, scale, bias, causal)
    return out_BTHV if sees_BTH1 is None else out_BTHV * sees_BTH1


def few_queries(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Decoding over a shared latent: the heads that share a key become rows of one matmul.

    No kernel of PyTorch takes shared keys with values of another width; the fallback would write
    every key once per query head.
    """
    batch, length, heads, _ = q_BTHQ.shape
    groups = k_BSGQ.shape[2]
    q_BGRQ = q_BTHQ.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BGRS = torch.matmul(q_BGRQ * scale, k_BSGQ.permute(0, 2, 3, 1)).to(wide(q_BTHQ.dtype))
    scores_BHTS = scores_BGRS.reshape(batch, heads, length, -1)
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    weights_BGRS = scores_BHTS.softmax(-1).to(v_BSGV.dtype).view(scores_BGRS.shape)
    out_BGRV = torch.matmul(weights_BGRS, v_BSGV.transpose(1, 2))
    return out_BGRV.reshape(batch, heads, length, -1).transpose(1, 2)


def sdpa(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    scale: float,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with the fastest kernel that is right for the shape."""
    shared = q_BTHQ.shape[2] != k_BSGQ.shape[2]
    if shared and (bias is not None or q_BTHQ.shape[-1] != v_BSGV.shape[-1]):
        share = q_BTHQ.shape[2] // k_BSGQ.shape[2]  # these kernels want one key head per query head
        k_BSGQ, v_BSGV = (t.repeat_interleave(share, dim=2) for t in (k_BSGQ, v_BSGV))
        shared = False
    q, k, v = (t.transpose(1, 2) for t in (q_BTHQ, k_BSGQ, v_BSGV))
    with sdpa_kernel(backends(q.shape[2], k.shape[2], bias is not None), set_priority=True):
        out_BHTV = scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=shared
        )
    return out_BHTV.transpose(1, 2)


def backends(n_queries: int, n_keys: int, masked: bool) -> list[SDPBackend]:
    """CUDA's kernels, fastest first.

    With a mask cuDNN's backward gives NaN at lengths that leave half a tile of 128 (pytorch issue
    196678), so it then runs on whole tiles only.
    """
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return order[1:] if masked and (n_queries % 128 or n_keys % 128) else order
