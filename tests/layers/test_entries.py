"""Entries: one grid per document, whole or packed, made once, in the step that completes them."""

import pytest
import torch
from torch import Tensor

from fathom.layers.cache import Cache, Stream
from fathom.layers.entries import Entries
from fathom.layers.step import Step

GRIDS = [(4, 2), (3, 3), (1, 1), (6, 2), (8, 8)]


def by_hand(documents: list[int], size: int, stride: int) -> tuple[list, list, list]:
    """Tokens of each entry, and the range of entries that each token sees."""
    entries, lows, highs, begin = [], [], [], 0
    for length in documents:
        low = len(entries)
        for t in range(length):
            done = (t + 1 - size) // stride + 1 if t + 1 >= size else 0
            lows.append(low)
            highs.append(low + done)
        for i in range(highs[-1] - low):
            entries.append([begin + i * stride + j for j in range(size)])
        begin += length
    return entries, lows, highs


@pytest.mark.parametrize(("size", "stride"), GRIDS)
@pytest.mark.parametrize("documents", [[13], [3], [5, 1, 7], [2, 2, 9]], ids=str)
def test_every_document_has_its_own_grid(documents, size, stride):
    total = sum(documents)
    borders = None
    if len(documents) > 1:
        borders = torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    step = Step.full(torch.zeros(1, total), borders)
    found = Entries.of(step, size, stride, "k")
    entries, lows, highs = by_hand(documents, size, stride)
    assert found.lows_BT.tolist() == [lows]
    assert found.highs_BT.tolist() == [highs]
    assert found.total >= len(entries)
    rows = torch.arange(total, dtype=torch.float64)[None, :, None]
    if entries:
        assert found.tokens(rows)[0, : len(entries), :, 0].tolist() == entries
        firsts = [step.positions_BT[0, entry[0]].item() for entry in entries]
        assert found.positions_BM[0, : len(entries)].tolist() == firsts


def summed(step: Step, new_BTW: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
    _, (rows_BSW,) = step.append(new_BTW, names=("raw",))
    entries = Entries.of(step, size, stride, "raw")
    (sums_BEW,) = entries.append(step, entries.tokens(rows_BSW).sum(2), names=("sum",))
    return sums_BEW, entries.highs_BT


@pytest.mark.parametrize(("size", "stride"), GRIDS)
@pytest.mark.parametrize("whole", [True, False], ids=["from-the-whole-stream", "from-a-tail"])
def test_decoding_makes_each_entry_in_the_step_that_completes_it(size, stride, whole):
    length, starts = 17, torch.tensor([4, 0])
    streams = [
        Stream("raw", 1, window=None if whole else size),
        Stream("sum", 1, tokens_per_entry=stride),
    ]
    rows = torch.randn(2, length, 1)
    cache = Cache([streams], batch_size=2, capacity=length)
    first = cache.rows(0, 1)  # row 0 is four tokens ahead
    summed(Step.cached(rows[:1, :4, 0], first).at(first.layers[0]), rows[:1, :4], size, stride)
    for chunk in (3, 1, 5, 1, 1):
        cache.length = int(starts.max())
        new = torch.stack([rows[b, s : s + chunk] for b, s in enumerate(starts.tolist())])
        step = Step.cached(new[..., 0], cache, starts).at(cache.layers[0])
        sums, highs = summed(step, new, size, stride)
        starts = starts + chunk
        for b, end in enumerate(starts.tolist()):
            want = rows[b, :end, 0].unfold(0, size, stride).sum(-1) if end >= size else []
            assert highs[b, -1] == len(want)
            torch.testing.assert_close(sums[b, : len(want), 0], torch.as_tensor(want))
