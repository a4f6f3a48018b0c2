"""NSA's three ops beside flash-linear-attention's plain ones, where the definitions agree.

They do where an entry of the compressed branch is one selectable block. Needs ``fla-core`` and
``einops``, which the other tests do not; passed with fla-core 0.6.0.
"""

import warnings

import pytest
import torch

from fathom.ops import block_attention, range_attention, select_by_importance

LENGTH, HEADS, GROUPS, BLOCK, BLOCKS = 61, 8, 2, 4, 6


@pytest.fixture
def naive():
    with warnings.catch_warnings():  # of what it would like to be installed beside it
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla.ops.nsa.naive")


def tensors():
    q = torch.randn(2, LENGTH, HEADS, 16)
    k, v = torch.randn(2, LENGTH, GROUPS, 16), torch.randn(2, LENGTH, GROUPS, 8)
    whole = LENGTH // BLOCK
    entries = [t[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).mean(2) for t in (k, v)]
    place = torch.arange(LENGTH, dtype=torch.int32).expand(2, -1)
    bounds = (torch.zeros_like(place), (place + 1) // BLOCK)
    return q, k, v, entries, place, bounds


def test_compressed_attention(naive):
    q, _, _, entries, _, bounds = tensors()
    want, _ = naive.naive_nsa_compression(q, *entries, BLOCK, 0.3)
    torch.testing.assert_close(range_attention(q, *entries, *bounds, scale=0.3), want)


def test_the_choice_of_blocks(naive):
    q, _, _, (k_cmp, _), place, bounds = tensors()
    padded = torch.cat([k_cmp, k_cmp[:, :1]], dim=1)  # it counts the last block, not yet complete
    want = naive.naive_nsa_topk(q, padded, BLOCKS, BLOCK, 0.3).sort(-1).values
    sizes = {"cmp_block_size": BLOCK, "cmp_stride": BLOCK, "block_size": BLOCK}
    starts = select_by_importance(
        q, k_cmp, *bounds, place, place, scale=0.3, topk_blocks=BLOCKS, **sizes
    )
    got = torch.where(starts < 0, -1, starts // BLOCK).sort(-1).values
    assert torch.equal(got.long(), want)


def test_attention_over_the_chosen_blocks(naive):
    q, k, v, (k_cmp, _), place, _ = tensors()
    padded = torch.cat([k_cmp, k_cmp[:, :1]], dim=1)
    blocks = naive.naive_nsa_topk(q, padded, BLOCKS, BLOCK, 0.3)
    want = naive.naive_nsa_selection(q, k, v, blocks, BLOCK, 0.3)
    starts = torch.where(blocks < 0, -1, blocks * BLOCK).to(torch.int32)
    got = block_attention(q, k, v, starts, place, block_size=BLOCK, scale=0.3)
    torch.testing.assert_close(got, want)
