"""The kernel of ``ops/router.py``: the best experts of each token, groups first if limited.

A score and its index become one integer that sorts as (score, lower index first), so ties have one
answer and the maximum of integers finds it. A NaN sorts above all numbers.

Shapes: N tokens, E = G * S experts in groups, K chosen per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sortable(score, index):
    """int64 keys in the order of the scores; of equal scores the lowest index has the highest."""
    score = tl.where(score == 0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (bits.to(tl.int64) << 32) + (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _score(key):
    """The score that a key was made of."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _best_experts(
    scores_NE,
    ids_NK,
    tokens,
    top_k,
    groups,
    size,
    kept,
    TOP_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group, place = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    expert = group[:, None] * size + place[None, :]  # [G, S]
    exists = (group[:, None] < groups) & (place[None, :] < size)
    at = token.to(tl.int64)[:, None, None] * (groups * size) + expert[None, :, :]
    inside = (token < tokens)[:, None, None] & exists[None, :, :]
    score = tl.load(scores_NE + at, mask=inside, other=0.0)
    nothing = -0x7FFFFFFFFFFFFFFF
    key = tl.where(exists[None, :, :], _sortable(score, expert[None, :, :]), nothing)
    if kept < groups:
        best = tl.max(key, axis=2)  # [N, G]
        value = _score(best)
        if TOP_TWO:
            value += _score(tl.max(tl.where(key == best[:, :, None], nothing, key), axis=2))
        group_key = tl.where((group < groups)[None, :], _sortable(value, group[None, :]), nothing)
        chosen = tl.zeros([TOKENS, GROUPS], tl.int32)
        for _ in range(kept):
            highest = tl.max(group_key, axis=1)[:, None]
            chosen = tl.where(group_key == highest, 1, chosen)
            group_key = tl.where(group_key == highest, nothing, group_key)
        key = tl.where(chosen[:, :, None] == 1, key, nothing)
    for k in range(top_k):
        highest = tl.max(tl.max(key, axis=2), axis=1)
        index = 0x7FFFFFFF - (highest & 0x7FFFFFFF)
        to = ids_NK + token.to(tl.int64) * top_k + k
        tl.store(to, index, mask=token < tokens)
        key = tl.where(key == highest[:, None, None], nothing, key)


def best_experts(
    scores_NE: Tensor, top_k: int, n_groups: int, n_kept: int, *, top_two: bool
) -> Tensor:
    """``ids_NK`` int64 of float32 scores; see ``ops.router.best_experts``."""
    tokens, experts = scores_NE.shape
    ids_NK = scores_NE.new_empty(tokens, top_k, dtype=torch.int64)
    groups, size = (triton.next_power_of_2(n) for n in (n_groups, experts // n_groups))
    block = max(1, 1024 // (groups * size))
    if tokens:
        _best_experts[(triton.cdiv(tokens, block),)](
            scores_NE.contiguous(),
            ids_NK,
            tokens,
            top_k,
            n_groups,
            experts // n_groups,
            n_kept,
            TOP_TWO=top_two,
            TOKENS=block,
            GROUPS=groups,
            SIZE=size,
        )
    return ids_NK
