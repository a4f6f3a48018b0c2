"""Selection: the portable fixtures' blocks, a loop over blocks, packed documents, ties."""

import pytest
import torch
from torch import Tensor

from fathom.ops import chunks as chunks_module
from fathom.ops import select_by_importance, select_by_mean
from fathom.ops.selection import best, spread

T = 70


def fill(shift: float, *shape: int) -> Tensor:
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (2 * torch.sin(0.7 * n + 1.3 * shift + 0.001 * n**2)).view(1, *shape)


def one_document(length: int = T) -> Tensor:
    return torch.arange(length, dtype=torch.int32)[None]


def numbers_of(starts: Tensor, block_size: int) -> list[int]:
    return sorted(start // block_size for start in starts.tolist() if start >= 0)


def mean_starts(q: Tensor, k: Tensor, block_size: int, topk_blocks: int) -> Tensor:
    blocks = q.shape[1] // block_size
    means = k[:, : blocks * block_size].unflatten(1, (blocks, block_size)).mean(2)
    places = one_document(q.shape[1])
    return select_by_mean(
        q,
        means,
        0 * places,
        places // block_size,
        places,
        places,
        block_size=block_size,
        topk_blocks=topk_blocks,
    )


def test_moba_selects_the_blocks_of_the_portable_fixture():
    starts = mean_starts(fill(0, T, 2, 8), fill(1, T, 2, 8), 8, 3)
    assert starts.dtype == torch.int32
    assert [numbers_of(starts[0, 69, h], 8) for h in (0, 1)] == [[4, 6, 8], [0, 7, 8]]
    assert [numbers_of(starts[0, 45, h], 8) for h in (0, 1)] == [[0, 4, 5], [0, 1, 5]]


def importance_starts(q: Tensor, k_cmp: Tensor, **changes) -> Tensor:
    options = {
        "scale": 8**-0.5,
        "cmp_block_size": 4,
        "cmp_stride": 2,
        "block_size": 8,
        "topk_blocks": 5,
    } | changes
    places = one_document(q.shape[1])
    seen = (places + 1 - options["cmp_block_size"]) // options["cmp_stride"] + 1
    return select_by_importance(
        q, k_cmp, 0 * places, seen.clamp(0, k_cmp.shape[1]), places, places, **options
    )


def pooled(k: Tensor, size: int, stride: int) -> Tensor:
    return k.unfold(1, size, stride).mean(-1)


def test_nsa_selects_the_blocks_of_the_portable_fixture():
    starts = importance_starts(fill(0, T, 4, 8), pooled(fill(1, T, 2, 8), 4, 2))
    assert [numbers_of(starts[0, 69, g], 8) for g in (0, 1)] == [[0, 1, 2, 7, 8], [0, 1, 3, 7, 8]]
    assert [numbers_of(starts[0, 45, g], 8) for g in (0, 1)] == [[0, 2, 3, 4, 5]] * 2


def test_importance_of_the_portable_fixture():
    q, k_cmp = fill(0, T, 4, 8), pooled(fill(1, T, 2, 8), 4, 2)
    scores = 8**-0.5 * torch.einsum("he,ce->hc", q[0, -1, :2], k_cmp[0, :, 0])
    weights = scores.softmax(-1).sum(0)[None, None, None]
    low = torch.zeros(1, 1, dtype=torch.int32)
    got = spread(weights, low, torch.arange(9), cmp_block_size=4, cmp_stride=2, block_size=8)
    want = torch.tensor([0.88533, 0.76997, 0.37666, 0.32457, 0.32385, 0.31355]).double()
    torch.testing.assert_close(got[0, 0, 0, 1:7], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "block"),
    [(32, 16, 64), (4, 2, 8), (8, 8, 8), (8, 2, 4), (6, 3, 3), (2, 2, 12)],
)
def test_weights_spread_by_the_strides_that_entries_and_blocks_share(size, stride, block):
    entries, blocks, low = 9, 12, 2
    weights = torch.rand(1, 1, 1, entries, dtype=torch.float64)
    weights[..., :low] = 0  # entries of the document before
    want = [
        sum(
            weights[0, 0, 0, low + i]
            * len({*range(i * stride, i * stride + size)} & {*range(j * block, (j + 1) * block)})
            / stride
            for i in range(entries - low)
        )
        for j in range(blocks)
    ]
    lows = torch.full((1, 1), low, dtype=torch.int32)
    got = spread(weights, lows, torch.arange(blocks), size, stride, block)
    torch.testing.assert_close(
        got[0, 0, 0], torch.stack([torch.as_tensor(w).double() for w in want])
    )


def test_forced_blocks_are_the_first_and_the_newest_and_nothing_lies_ahead():
    starts = importance_starts(
        torch.randn(1, T, 4, 8), torch.randn(1, 34, 2, 8), n_initial=2, n_local=2
    )
    for t in range(T):
        current = t // 8
        for g in (0, 1):
            chosen = numbers_of(starts[0, t, g], 8)
            assert chosen == sorted(set(chosen))
            assert {0, min(1, current), max(current - 1, 0), current} <= set(chosen)
            assert len(chosen) == min(5, current + 1)


def test_ties_go_to_the_earliest_block():
    starts = importance_starts(torch.zeros(1, T, 4, 8), torch.zeros(1, 34, 2, 8))
    # all weights are equal, but block 0 has no entry before it: blocks 1, 2, 3, ... tie
    assert numbers_of(starts[0, 69, 0], 8) == [0, 1, 2, 7, 8]
    starts = mean_starts(torch.zeros(1, T, 2, 8), torch.zeros(1, T, 2, 8), 8, 4)
    assert numbers_of(starts[0, 69, 1], 8) == [0, 1, 2, 8]
    assert best(torch.tensor([1.0, 3.0, 3.0, float("-inf")]), 5).tolist() == [1, 2, 0, -1, -1]


def test_a_short_document_selects_its_current_block_alone():
    starts = mean_starts(torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), 8, 3)
    assert starts.tolist() == [[[[0, -1, -1]] * 2] * 5]
    starts = importance_starts(torch.randn(1, 3, 4, 8), torch.zeros(1, 0, 2, 8))
    assert starts.tolist() == [[[[0, -1, -1, -1, -1]] * 2] * 3]


def test_packed_documents_select_as_if_each_were_alone(monkeypatch):
    lengths = [19, 3, 27, 21]
    q, k = torch.randn(1, T, 2, 8).double(), torch.randn(1, T, 2, 8).double()
    positions = torch.cat([one_document(n) for n in lengths], dim=1)
    places, means, lows, first, alone = one_document(), [], [], 0, []
    for length in lengths:
        rows = slice(first, first + length)
        single = mean_starts(q[:, rows], k[:, rows], 4, 3)
        alone.append(torch.where(single < 0, single, single + first))
        lows += [sum(m.shape[1] for m in means)] * length
        whole = length // 4
        means.append(k[:, first : first + whole * 4].unflatten(1, (whole, 4)).mean(2))
        first += length
    lows = torch.tensor([lows], dtype=torch.int32)
    for limit in (1 << 24, 100):
        monkeypatch.setattr(chunks_module, "CHUNK_NUMBERS", limit)
        packed = select_by_mean(
            q,
            torch.cat(means, dim=1),
            lows,
            lows + positions // 4,
            positions,
            places,
            block_size=4,
            topk_blocks=3,
        )
        assert torch.equal(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"topk_blocks": 2}, "topk_blocks must hold"), ({"block_size": 5}, "cmp_stride must divide")],
)
def test_what_cannot_be_selected_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        importance_starts(torch.randn(1, T, 4, 8), torch.randn(1, 34, 2, 8), **changes)
