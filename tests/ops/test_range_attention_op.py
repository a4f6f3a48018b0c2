"""Attention over a range per query: windows and compressed entries against float64 masks."""

import pytest
import torch

from fathom.ops import attention, range_attention
from fathom.ops import chunks as chunks_module

IMPLS = ["reference", "torch"]
SHAPES = {  # B, T, S, H, G, Q, V
    "heads": (2, 11, 11, 4, 4, 8, 8),
    "grouped": (2, 11, 11, 6, 2, 5, 3),
    "few-entries": (1, 13, 5, 4, 1, 3, 8),
    "one-query": (3, 1, 17, 4, 2, 8, 8),
}


def tensors(shape, device="cpu", dtype=torch.float32):
    """Ranges that never fall; the first queries see nothing, as before the first entry."""
    batch, length, keys, heads, groups, width, values = shape
    sizes = ((length, heads, width), (keys, groups, width), (keys, groups, values))
    q, k, v = (torch.randn(batch, *size, device=device, dtype=dtype) for size in sizes)
    lows, highs = (
        torch.randint(0, keys + 1, (batch, length), device=device).sort(dim=1).values
        for _ in range(2)
    )
    highs[:, : length // 4] = 0
    return (q, k, v), lows.to(torch.int32), highs.to(torch.int32)


def masked(lows, highs):
    """What the range means, as a mask on plain attention, which has its own float64 tests."""

    def run(q, k, v):
        keys = torch.arange(k.shape[1], device=q.device)
        seen = (keys >= lows[..., None]) & (keys < highs[..., None])
        return attention(q, k, v, scale=0.4, mask=seen[:, None], impl="reference")

    return run


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(impl, shape, agree, device):
    inputs, lows, highs = tensors(shape, device)
    agree(
        lambda q, k, v: range_attention(q, k, v, lows, highs, scale=0.4, impl=impl),
        masked(lows, highs),
        inputs,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_agree_with_finite_differences(impl):
    inputs, lows, highs = tensors((1, 5, 4, 4, 2, 3, 2), dtype=torch.float64)

    def run(q, k, v):
        return range_attention(q, k, v, lows, highs, scale=0.7, impl=impl)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_range_gives_exact_zeros_and_finite_gradients(impl, device):
    inputs, lows, highs = tensors(SHAPES["grouped"], device)
    lows[1, 7:], highs[1] = 11, lows[1]
    inputs = [t.requires_grad_() for t in inputs]
    out = range_attention(*inputs, lows, highs, scale=1.0, impl=impl)
    out.sum().backward()
    assert not out[1].any()
    assert not inputs[0].grad[1].any()
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_range_of_all_so_far_is_causal_attention(impl):
    (q, k, v), lows, _ = tensors(SHAPES["grouped"], dtype=torch.float64)
    highs = torch.arange(1, 12, dtype=torch.int32).expand(2, -1)
    out = range_attention(q, k, v, 0 * lows, highs, scale=0.3, impl=impl)
    torch.testing.assert_close(out, attention(q, k, v, scale=0.3, causal=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_of_queries_change_nothing(impl, monkeypatch):
    inputs, lows, highs = tensors(SHAPES["grouped"], dtype=torch.float64)
    found = []
    for limit in (1 << 24, 100):
        monkeypatch.setattr(chunks_module, "CHUNK_NUMBERS", limit)
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = range_attention(*leaves, lows, highs, scale=0.4, impl=impl)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_no_entries_give_zeros():
    (q, k, v), lows, highs = tensors(SHAPES["grouped"])
    out = range_attention(q, k[:, :0], v[:, :0], 0 * lows, 0 * highs, scale=1.0)
    assert torch.equal(out, torch.zeros(2, 11, 6, 3))


def test_heads_that_do_not_divide_are_refused():
    (q, k, v), lows, highs = tensors((1, 3, 3, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 key heads"):
        range_attention(q, k, v, lows, highs, scale=1.0)
