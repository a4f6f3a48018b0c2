"""Attention over selected blocks: against one query at a time in float64; decoding; chunks."""

import pytest
import torch
from torch import Tensor

from fathom.ops import attention, block_attention
from fathom.ops import chunks as chunks_module
from fathom.ops.block_attention import selected_keys

IMPLS = ["reference", "torch"]
SHAPES = {  # B, T, S, H, G, I, N, block, Q, V
    "nsa": (2, 13, 13, 8, 2, 2, 3, 4, 8, 8),
    "moba": (2, 13, 13, 4, 2, 4, 2, 5, 6, 3),
    "dsa-tokens": (1, 17, 17, 6, 1, 1, 7, 1, 12, 8),
    "three-groups-two-selections": (1, 11, 11, 6, 3, 2, 2, 3, 5, 7),
    "chunk-of-a-longer-cache": (2, 9, 23, 4, 2, 2, 3, 4, 8, 5),
    "one-block-of-everything": (1, 10, 10, 2, 1, 1, 1, 16, 4, 4),
}


def tensors(shape, device="cpu", dtype=torch.float32):
    """Queries are the last T of the S keys; blocks are distinct, some lie ahead, some are none."""
    batch, length, keys, heads, groups, selections, blocks, size, width, values = shape
    q = torch.randn(batch, length, heads, width, device=device, dtype=dtype)
    k = torch.randn(batch, keys, groups, width, device=device, dtype=dtype)
    v = torch.randn(batch, keys, groups, values, device=device, dtype=dtype)
    grid = -(-keys // size)
    order = torch.rand(batch, length, selections, max(grid, blocks), device=device).argsort(-1)
    starts = order[..., :blocks] * size
    starts[starts >= keys] = -1
    starts[torch.rand(starts.shape, device=device) < 0.2] = -1
    places = torch.arange(keys - length, keys, device=device).expand(batch, -1)
    return q, k, v, starts.to(torch.int32), places


def query_by_query(starts: Tensor, places: Tensor, size: int, scale: float):
    """A second derivation: loops over queries and lists of keys."""

    def run(q, k, v):
        out = q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
        share, same = q.shape[2] // k.shape[2], q.shape[2] // starts.shape[2]
        for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
            place = int(places[b, t])
            keys = [
                s
                for start in starts[b, t, h // same].tolist()
                if start >= 0
                for s in range(start, min(start + size, place + 1, k.shape[1]))
            ]
            if keys:
                scores = scale * k[b, keys, h // share] @ q[b, t, h]
                out[b, t, h] = scores.softmax(0) @ v[b, keys, h // share]
        return out

    return run


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(impl, shape, agree, device):
    q, k, v, starts, places = tensors(shape, device)
    size = shape[7]
    agree(
        lambda q, k, v: block_attention(
            q, k, v, starts, places, block_size=size, scale=0.4, impl=impl
        ),
        query_by_query(starts, places, size, 0.4),
        (q, k, v),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_agree_with_finite_differences(impl):
    q, k, v, starts, places = tensors((1, 9, 9, 4, 2, 2, 2, 3, 2, 3), dtype=torch.float64)

    def run(q, k, v):
        return block_attention(q, k, v, starts, places, block_size=3, scale=0.7, impl=impl)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (q, k, v)])


@pytest.mark.parametrize("impl", IMPLS)
def test_all_blocks_are_causal_attention(impl):
    q, k, v, _, places = tensors((2, 14, 14, 4, 2, 2, 1, 4, 8, 8), dtype=torch.float64)
    starts = torch.arange(0, 14, 4, dtype=torch.int32).expand(2, 14, 2, -1)
    out = block_attention(q, k, v, starts, places, block_size=4, scale=0.3, impl=impl)
    torch.testing.assert_close(out, attention(q, k, v, scale=0.3, causal=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_blocks_does_not_matter(impl):
    q, k, v, starts, places = tensors(SHAPES["nsa"], dtype=torch.float64)
    options = {"block_size": 4, "scale": 0.4, "impl": impl}
    out = block_attention(q, k, v, starts, places, **options)
    torch.testing.assert_close(out, block_attention(q, k, v, starts.flip(-1), places, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_without_blocks_gives_exact_zeros_and_finite_gradients(impl, device):
    q, k, v, starts, places = tensors(SHAPES["nsa"], device)
    starts[0, 5] = -1
    starts[0, 6] = 8  # a block ahead of the query shows nothing either
    starts[1, :, 1] = -1
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = block_attention(q, k, v, starts, places, block_size=4, scale=1.0, impl=impl)
    out.sum().backward()
    assert not out[0, 5:7].any()
    assert not out[1, :, 4:].any()
    assert not q.grad[0, 5:7].any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("length", [1, 3])
def test_a_few_queries_gather_and_equal_their_place_in_the_whole(length):
    q, k, v, starts, places = tensors(SHAPES["nsa"], dtype=torch.float64)
    whole = block_attention(q, k, v, starts, places, block_size=4, scale=0.4, impl="torch")
    last = slice(-length, None)
    few = (q[:, last], k, v, starts[:, last], places[:, last])
    torch.testing.assert_close(block_attention(*few, block_size=4, scale=0.4), whole[:, last])
    with pytest.raises(ValueError, match="it needs more than 8 queries"):
        block_attention(*few, block_size=4, scale=0.4, impl="torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_of_queries_change_nothing(impl, monkeypatch):
    q, k, v, starts, places = tensors(SHAPES["moba"], dtype=torch.float64)
    found = []
    for limit in (1 << 24, 700):  # 700: one to six queries at a time
        monkeypatch.setattr(chunks_module, "CHUNK_NUMBERS", limit)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = block_attention(*leaves, starts, places, block_size=5, scale=0.4, impl=impl)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "blocks"])
def test_empty_inputs_give_empty_or_zero_outputs(empty):
    q, k, v, starts, places = tensors(SHAPES["nsa"])
    cut = {
        "batch": lambda: (q[:0], k[:0], v[:0], starts[:0], places[:0]),
        "queries": lambda: (q[:, :0], k, v, starts[:, :0], places[:, :0]),
        "keys": lambda: (q, k[:, :0], v[:, :0], starts, places),
        "blocks": lambda: (q, k, v, starts[..., :0], places),
    }[empty]()
    out = block_attention(*cut, block_size=4, scale=1.0)
    assert torch.equal(out, torch.zeros(*cut[0].shape[:3], v.shape[3]))


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_close_to_float64(impl, device):
    q, k, v, starts, places = tensors(SHAPES["nsa"], device, torch.bfloat16)
    got = block_attention(q, k, v, starts, places, block_size=4, scale=0.3, impl=impl)
    want = query_by_query(starts, places, 4, 0.3)(*(t.double() for t in (q, k, v)))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_selected_keys_stop_at_the_query_and_at_the_end():
    starts = torch.tensor([[[[0, 4, -1]], [[4, -1, 2]]]], dtype=torch.int32)
    seen = selected_keys(starts, torch.tensor([[5, 3]]), block_size=2, n_keys=5)
    assert seen[0, :, 0].int().tolist() == [[1, 1, 0, 0, 1], [0, 0, 1, 1, 0]]


def test_heads_that_do_not_divide_are_refused():
    q, k, v, starts, places = tensors((1, 9, 9, 6, 2, 2, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="2 key heads and 4 selection heads"):
        block_attention(q, k, v, starts.repeat(1, 1, 2, 1), places, block_size=4, scale=1.0)
