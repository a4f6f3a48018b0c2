"""Attention over a range of keys for each query: a window, or the compressed entries so far.

Sliding windows and the compressed branch of NSA (arXiv:2502.11089, section 3.3) are this one op:
query t sees keys ``[low_t, high_t)``. Neither bound ever falls along a row, so the queries that see
a key are a range too, and a kernel needs no other mask, packed documents included.

Shapes: B batch, T queries, S keys, H query heads, G key-value heads, Q query and key width, V value
width. Query head ``h`` reads key-value head ``h // (H / G)``.
"""

import torch
from torch import Tensor

from fathom.ops.attention import additive, attention_reference, torch_attention, torch_refusal
from fathom.ops.chunks import by_queries, chunk_size
from fathom.ops.registry import Impl, Implementations, autocast, choose, no_kernel, takes_all

RANGE_ATTENTION = Implementations(
    op="range_attention",
    refusals={"triton": no_kernel, "torch": torch_refusal, "reference": takes_all},
)


def range_attention(
    q_BTHQ: Tensor,
    k_BSGQ: Tensor,
    v_BSGV: Tensor,
    lows_BT: Tensor,
    highs_BT: Tensor,
    *,
    scale: float,
    impl: Impl = "auto",
) -> Tensor:
    """One softmax over the keys ``[low, high)`` of each query, ``[B, T, H, V]``.

    Args:
        q_BTHQ: queries.
        k_BSGQ: keys; G divides H.
        v_BSGV: values; V may differ from Q.
        lows_BT: int, the first key a query sees; never falls along a row.
        highs_BT: int, the first key it does not see any more, at most S; never falls along a row.
        scale: what a score is multiplied by.
        impl: which implementation.

    The softmax is in float32 (float64 for float64), the result in q's dtype. An empty range gives
    zeros and passes no gradient back.

    Raises:
        ValueError: G does not divide H, or a refused ``impl``.
    """
    q_BTHQ, k_BSGQ, v_BSGV = autocast(q_BTHQ, k_BSGQ, v_BSGV)
    if q_BTHQ.shape[2] % k_BSGQ.shape[2]:
        raise ValueError(
            f"{q_BTHQ.shape[2]} query heads do not divide among {k_BSGQ.shape[2]} key heads"
        )
    chosen = choose(RANGE_ATTENTION, impl, q_BTHQ, k_BSGQ, v_BSGV)
    core = attention_reference if chosen == "reference" else torch_attention
    batch, n_keys = k_BSGQ.shape[:2]

    def run(q_BTHQ: Tensor, lows_BT: Tensor, highs_BT: Tensor) -> Tensor:
        bias = additive(in_range(lows_BT, highs_BT, n_keys)[:, None], q_BTHQ.dtype)
        return core(q_BTHQ, k_BSGQ, v_BSGV, scale, bias, False)

    numbers = batch * n_keys * (q_BTHQ.shape[2] if chosen == "reference" else 1)
    return by_queries(run, chunk_size(numbers), q_BTHQ, lows_BT, highs_BT)


def in_range(lows_BT: Tensor, highs_BT: Tensor, n_keys: int) -> Tensor:
    """Which of all keys each query sees, bool ``[B, T, S]``."""
    keys = torch.arange(n_keys, device=lows_BT.device)
    return (keys >= lows_BT[..., None]) & (keys < highs_BT[..., None])
