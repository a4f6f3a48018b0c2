"""The kernels of block attention: interpreted in float32, on a GPU at their real tiles."""

import math

import pytest
import torch
from torch.library import opcheck

from fathom.ops import block_attention
from fathom.ops.block_attention import _block_attention, block_attention_reference
from fathom.ops.triton import block_attention as kernels
from fathom.ops.triton.block_lists import chunks, lists
from ops.guards import Guards
from ops.hopper import SHARED_LIMIT, Source, build

SHAPES = {  # B, T, S, H, G, I, N, block, Q, V
    "nsa-by-query": (1, 7, 7, 16, 2, 2, 2, 4, 8, 24),
    "blocks-longer-than-a-tile": (1, 5, 70, 9, 1, 1, 2, 48, 8, 8),
    "moba-by-block": (2, 7, 7, 4, 2, 4, 2, 5, 24, 8),
    "tokens-of-a-longer-cache": (1, 5, 9, 6, 3, 2, 3, 1, 8, 16),
}

KINDS = {
    "*bf16": "q k v out dout dq dk dv part_out part_dq",
    "*fp32": "lse delta part_lse part_dk part_dv",
    "*i32": "starts entries table places count",
    "i32:16": "T S room",
    "fp32": "scale back_scale",
}
TYPES = {name: kind for kind, names in KINDS.items() for name in names.split()}


def tensors(shape, device="cpu", dtype=torch.float32):
    """Queries are the last of the keys; some blocks lie ahead, some are none, one row has none."""
    batch, length, keys, heads, groups, selections, blocks, size, width, values = shape
    q = torch.randn(batch, length, heads, width, device=device, dtype=dtype)
    k = torch.randn(batch, keys, groups, width, device=device, dtype=dtype)
    v = torch.randn(batch, keys, groups, values, device=device, dtype=dtype)
    grid = -(-keys // size)
    order = torch.rand(batch, length, selections, max(grid, blocks), device=device).argsort(-1)
    starts = order[..., :blocks] * size
    starts[starts >= keys] = -1
    starts[torch.rand(starts.shape, device=device) < 0.2] = -1
    starts[0, length // 2] = -1
    places = torch.arange(keys - length, keys, device=device).expand(batch, -1)
    return q, k, v, starts.to(torch.int32), places


def kernel(q, k, v, starts, places, size, scale):
    """The op as its dispatch calls it, on any device."""
    pairs = math.lcm(k.shape[2], starts.shape[2])
    starts = starts.repeat_interleave(pairs // starts.shape[2], dim=2).contiguous()
    places = places.to(torch.int32).contiguous()
    return _block_attention(q, k, v, starts, places, size, scale)[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_the_references(shape, agree, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 16)  # lists are cut and summed
    q, k, v, starts, places = tensors(shape)
    size = shape[7]
    agree(
        lambda q, k, v: kernel(q, k, v, starts, places, size, 0.4),
        lambda q, k, v: block_attention_reference(q, k, v, starts, places, size, 0.4),
        (q, k, v),
    )


@pytest.mark.parametrize("name", ["nsa-by-query", "moba-by-block"])
def test_float16_goes_through_the_tiles_of_a_gpu(name, agree):
    q, k, v, starts, places = tensors(SHAPES[name], dtype=torch.float16)
    size = SHAPES[name][7]
    agree(
        lambda q, k, v: kernel(q, k, v, starts, places, size, 0.4),
        lambda q, k, v: block_attention_reference(q, k, v, starts, places, size, 0.4),
        (q, k, v),
        tol=2e-3,
    )


@pytest.mark.parametrize("few", [0, 99], ids=["by-query", "by-block"])
def test_packed_documents_of_any_length_restart_the_grid(few, agree, monkeypatch):
    monkeypatch.setattr(kernels, "FEW_HEADS", few)
    q, k, v, _, places = tensors((1, 9, 9, 4, 2, 2, 2, 4, 8, 8))
    begin = torch.tensor([0, 0, 0, 0, 0, 5, 5, 5, 5])  # the block at 4 runs into that at 5
    current = begin + (torch.arange(9) - begin) // 4 * 4
    starts = torch.stack([begin, current.where(current > begin, -1)], -1)[None, :, None]
    starts = starts.expand(-1, -1, 2, -1).to(torch.int32)
    agree(
        lambda q, k, v: kernel(q, k, v, starts, places, 4, 0.4),
        lambda q, k, v: block_attention_reference(q, k, v, starts, places, 4, 0.4),
        (q, k, v),
    )


@pytest.mark.parametrize("few", [0, 99], ids=["by-query", "by-block"])
def test_nothing_is_written_outside_and_everything_inside(few, monkeypatch):
    monkeypatch.setattr(kernels, "FEW_HEADS", few)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 16)
    q, k, v, starts, places = tensors((1, 5, 5, 3, 1, 1, 2, 3, 8, 8))
    with Guards() as guards:
        arguments = (q, k, v, starts, places.to(torch.int32).contiguous())
        out, lse = kernels.forward(*arguments, 3, 0.4)
        gradients = kernels.backward(*arguments, out, lse, out, 3, 0.4)
    guards.check()
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert not out[0, 2].any()  # the query without blocks
    assert not gradients[0][0, 2].any()
    assert lse[0, 2].eq(float("inf")).all()


@pytest.mark.parametrize("length", [3, 12], ids=["by-query", "by-block"])
def test_the_filled_part_of_a_cache_is_read_where_it_stands(length):
    q, k, v, starts, places = tensors((2, length, 20, 4, 2, 4, 2, 5, 8, 8))
    want = kernel(q, k[:, :17], v[:, :17], starts, places, 5, 0.4)
    got = kernel(q, k[:, :17].contiguous(), v[:, :17].contiguous(), starts, places, 5, 0.4)
    assert torch.equal(got, want)
    exact = (t.double() for t in (q, k[:, :17], v[:, :17]))
    right = block_attention_reference(*exact, starts, places, 5, 0.4)
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_the_ops_pass_opcheck():
    q, k, v, starts, places = tensors((1, 4, 4, 2, 1, 1, 1, 4, 8, 8))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    inputs = (*leaves, starts, places.to(torch.int32).contiguous(), 4, 0.4)
    opcheck(torch.ops.fathom.block_attention.default, inputs)


def test_every_entry_is_in_exactly_one_chunk_of_its_block():
    starts = tensors((2, 40, 40, 4, 2, 4, 3, 8, 8, 8))[3]
    made = lists(starts, 2, 40)
    cut = chunks(made, 4, 80)
    table = cut.table[: int(cut.number)].tolist()
    found = {}
    for bin_, first, end, limit, _ in table:
        assert 0 < end - first <= 4
        assert bin_ % 40 < limit <= bin_ % 40 + 8
        for entry in made.entries[first:end].tolist():
            found.setdefault(bin_, []).append(entry)
    found = {bin_: sorted(entries) for bin_, entries in found.items()}
    flat, per_row = starts.flatten().tolist(), starts[0].numel()
    want = {}
    for entry, start in enumerate(flat):
        if start >= 0:
            row, head = entry // per_row, entry // 3 % 4 // 2
            want.setdefault((row * 2 + head) * 40 + start, []).append(entry)
    assert found == want
    sizes = [end - first for _, first, end, *_ in table]
    assert sizes == sorted(sizes, reverse=True)
    parts = sorted(part for *_, part in table if part >= 0)
    assert parts == list(range(len(parts)))
    assert len(parts) <= cut.n_parts
    whole = [bin_ for bin_, *_, part in table if part < 0]
    assert len(whole) == len(set(whole))


def test_the_kernels_fit_a_hopper_without_spilling():
    common = {"batch": 1, "length": 65536, "n_keys": 65536, "heads": 64, "width": 128}
    nsa = {"groups": 4, "pairs": 4, "blocks": 16, "block_size": 64}
    moba = {"groups": 64, "pairs": 64, "blocks": 8, "block_size": 128}
    sources = []
    for name in kernels.TILES:
        sizes = moba if name in ("forward_by_block", "dq_by_block") else nsa
        shape = kernels.Shape(**common, values=128, **sizes)
        cut = kernels.tile(name, shape, torch.bfloat16)
        options = cut.options()
        launch = {n: options.pop(n) for n in ("num_warps", "num_stages")}
        padded = max(shape.rows, 16) if "query" in name else shape.rows
        arguments = TYPES | shape.constants() | {"RP": padded} | options
        sources.append(Source(f"fathom.ops.triton.block_attention:_{name}", arguments, launch))
    for built in build(*sources):
        # A few addresses of the outer loop wait on the stack: faster than more warps without.
        assert built.spilled <= (64 if "dkv" in built.kernel else 0), built
        assert built.shared <= SHARED_LIMIT, built
        assert built.wgmma == ("block" in built.kernel.split(":")[1]), built


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 700, 700, 32, 2, 2, 6, 64, 128, 128),
        (1, 333, 900, 24, 2, 2, 3, 48, 192, 128),
        (1, 1025, 1025, 8, 2, 8, 3, 128, 128, 64),
        (1, 257, 257, 6, 3, 2, 33, 1, 72, 56),
        (1, 300, 300, 128, 1, 1, 4, 16, 64, 64),
    ],
    ids=["nsa", "odd-group-odd-block", "moba", "tokens", "many-heads"],
)
def test_on_a_gpu_it_is_as_exact_as_pytorch_in_the_same_dtype(shape, dtype):
    q, k, v, starts, places = tensors(shape, "cuda", dtype)
    dout = torch.randn(*q.shape[:3], v.shape[3], device="cuda", dtype=dtype)

    def run(impl, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = block_attention(*leaves, starts, places, block_size=shape[7], scale=0.1, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    exact = run("reference", q.double(), k.double(), v.double())
    plain, ours, again = run("torch", q, k, v), run("triton", q, k, v), run("triton", q, k, v)
    for want, same_dtype, got, twice in zip(exact, plain, ours, again, strict=True):
        bound = 2 * (same_dtype - want).abs().max() + 1e-5 * want.abs().max()
        assert (got - want).abs().max() <= bound
        assert torch.equal(got, twice)
