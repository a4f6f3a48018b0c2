"""The kernels of selection: the same blocks as the references, ties included."""

import pytest
import torch

from fathom.ops.selection import select_by_importance, select_by_mean
from fathom.ops.triton import range_attention
from fathom.ops.triton import selection as kernels
from ops.hopper import SHARED_LIMIT, Source, build

KINDS = {
    "*bf16": "q k means",
    "*fp32": "lse",
    "*i32": "lows highs positions places starts",
    "i32:16": "T E room",
    "fp32": "scale",
}
TYPES = {name: kind for kind, names in KINDS.items() for name in names.split()}
IMPORTANCE = {  # documents, H, G, entry, stride, block, blocks
    "one-entry-a-block": ([3, 25, 7], 8, 1, 4, 4, 4, 5),
    "overlapping-entries": ([30, 21], 3, 3, 8, 4, 16, 4),
    "entries-longer-than-blocks": ([9, 40], 2, 1, 16, 4, 8, 3),
    "more-blocks-than-are-kept": ([75], 2, 1, 1, 1, 1, 4),
}


def counted(documents, entries, seen):
    """Places, positions, and bounds of what ``seen`` of ``entries`` a position sees."""
    position = torch.cat([torch.arange(n) for n in documents])
    counts = torch.tensor([entries(n) for n in documents])
    lows = (counts.cumsum(0) - counts).repeat_interleave(torch.tensor(documents))
    rows = (lows, lows + seen(position), position, torch.arange(len(position)))
    return [t.to(torch.int32)[None] for t in rows], int(counts.sum())


def by_importance(case, *, ties=False, **kind):
    documents, heads, groups, size, stride, block, blocks = case

    def complete(n):
        return (torch.as_tensor(n) - size).div(stride, rounding_mode="floor").add(1).clamp(min=0)

    counts, n_entries = counted(documents, complete, lambda p: complete(p + 1))
    q = torch.randn(1, sum(documents), heads, 16, **kind)
    k = torch.randn(1, n_entries, groups, 16, **kind) * (not ties)
    counts = [t.to(q.device) for t in counts]
    sizes = {"cmp_block_size": size, "cmp_stride": stride, "block_size": block}
    return (q, k, *counts), sizes | {"topk_blocks": blocks}


@pytest.mark.parametrize("known", [False, True], ids=["sums-it-up", "knows-the-sums"])
@pytest.mark.parametrize("case", IMPORTANCE.values(), ids=IMPORTANCE)
def test_importance_selects_the_references_blocks(case, known, monkeypatch):
    monkeypatch.setattr(kernels, "KEPT", 64)
    (q, k, lows, highs, *rest), sizes = by_importance(case)
    want = select_by_importance(q, k, lows, highs, *rest, scale=0.25, **sizes, impl="reference")
    lse = range_attention.forward(q, k, k, lows, highs, 0.25)[1] if known else None
    tensors = (q, k, lows, highs, *rest, lse)
    assert torch.equal(kernels.select_by_importance(*tensors, 0.25, *sizes.values(), 1, 2), want)


def test_equal_importance_selects_the_forced_blocks_then_the_earliest():
    tensors, sizes = by_importance(([31], 2, 1, 4, 4, 4, 5), ties=True)
    got = kernels.select_by_importance(*tensors, None, 0.25, *sizes.values(), 1, 2)[0, :, 0]
    for position, starts in enumerate(got.tolist()):
        current = position // 4
        forced = sorted({0, max(current - 1, 0), current})
        rest = [j for j in range(current) if j not in forced]
        assert starts == [4 * j for j in forced + rest][:5] + [-1] * (5 - current - 1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("heads", "groups", "blocks"), [(4, 2, 3), (3, 3, 1)])
def test_means_select_the_references_blocks(heads, groups, blocks, ties):
    documents = [3, 26, 9]
    counts, n_entries = counted(documents, lambda n: n // 4, lambda p: p // 4)
    q = torch.randn(1, sum(documents), heads, 8)
    means = torch.randn(1, n_entries, groups, 8) * (not ties)
    sizes = {"block_size": 4, "topk_blocks": blocks}
    want = select_by_mean(q, means, *counts, **sizes, impl="reference")
    assert torch.equal(kernels.select_by_mean(q, means, *counts, 4, blocks), want)


def test_entries_of_a_cache_that_has_room_for_more_are_read_where_they_stand():
    counts, n_entries = counted([26], lambda n: n // 4, lambda p: p // 4)
    counts = [t.repeat(2, 1) for t in counts]
    q, means = torch.randn(2, 26, 2, 8), torch.randn(2, n_entries + 3, 2, 8)
    sizes = {"block_size": 4, "topk_blocks": 3}
    filled = means[:, :n_entries]
    want = select_by_mean(q, filled, *counts, **sizes, impl="reference")
    assert torch.equal(kernels.select_by_mean(q, filled, *counts, 4, 3), want)


def test_the_kernels_fit_a_hopper_without_spilling():
    nsa = {"H": 64, "G": 4, "R": 16, "RP": 16, "Q": 128, "QP": 128, "N": 16, "NP": 16, "BLOCK": 64}
    sizes = kernels.BY_IMPORTANCE.options("ENTRIES")
    launch = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    cut = {"INITIAL": 1, "LOCAL": 2, "KNOWN": False} | sizes
    paper = cut | {"BEFORE": 2, "LENGTH": 4, "J": 15, "JP": 16, "TILES": 32}
    plain = cut | {"BEFORE": 1, "LENGTH": 1, "J": 64, "JP": 64, "TILES": 8, "KNOWN": True}
    moba = nsa | {"G": 64, "R": 1, "RP": 1, "N": 8, "NP": 8, "ENTRIES": 64, "ROWS": 64}
    module = "fathom.ops.triton.selection"
    for built in build(
        Source(f"{module}:_by_importance", TYPES | nsa | paper, launch),
        Source(f"{module}:_by_importance", TYPES | nsa | plain, launch),
        Source(f"{module}:_by_mean", TYPES | moba, {"num_warps": 4, "num_stages": 2}),
    ):
        assert built.spilled == 0, built
        assert built.shared <= SHARED_LIMIT, built
        assert built.wgmma, built


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [([700, 3, 390], 32, 2, 32, 16, 64, 6), ([999], 6, 2, 64, 64, 64, 4)]
)
def test_on_a_gpu_it_selects_what_float64_selects_but_for_near_ties(case):
    tensors, sizes = by_importance(case, device="cuda", dtype=torch.bfloat16)
    exact = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    want = select_by_importance(*exact, scale=0.25, **sizes, impl="reference").sort(-1).values
    got = select_by_importance(*tensors, scale=0.25, **sizes, impl="triton").sort(-1).values
    assert (got != want).float().mean() < 2e-3
    again = select_by_importance(*tensors, scale=0.25, **sizes, impl="triton").sort(-1).values
    assert torch.equal(got, again)
