"""The kernels of range attention: interpreted in float32, on a GPU at their real tiles."""

import pytest
import torch
from torch.library import opcheck

from fathom.ops import range_attention
from fathom.ops.range_attention import _range_attention
from fathom.ops.triton import range_attention as kernels
from fathom.ops.triton.softmax import key_rows
from ops.guards import Guards
from ops.hopper import SHARED_LIMIT, Source, build

KINDS = {
    "*bf16": "q k v out dout dq dk dv",
    "*fp32": "lse delta",
    "*i32": "lows highs firsts lasts",
    "i32:16": "T S room",
    "fp32": "scale back_scale",
}
TYPES = {name: kind for kind, names in KINDS.items() for name in names.split()}


def tensors(batch, documents, heads, groups, width, values, window=None, stride=1, **kind):
    """Packed documents; a window, or with a stride compressed entries, which early queries lack."""
    position = torch.cat([torch.arange(n) for n in documents])
    begin = torch.arange(sum(documents)) - position
    if window:
        lows, highs = begin + (position + 1 - window).clamp(min=0), begin + position + 1
    else:
        entries = [n // stride for n in documents]
        first = torch.tensor([sum(entries[:i]) for i in range(len(documents))])
        lows = first.repeat_interleave(torch.tensor(documents))
        highs = lows + (position + 1) // stride
    n_keys = sum(documents) if window else max(sum(n // stride for n in documents), 1)
    q = torch.randn(batch, len(position), heads, width, **kind)
    k, v = (torch.randn(batch, n_keys, groups, w, **kind) for w in (width, values))
    bounds = (t.to(q.device, torch.int32).expand(batch, -1).contiguous() for t in (lows, highs))
    return q, k, v, *bounds


CASES = {
    "window": (2, [13, 1, 6], 4, 2, 8, 24, 5),
    "compressed": (1, [3, 17, 9], 9, 3, 24, 8, None, 4),
    "one-head": (1, [7], 1, 1, 8, 8, 3),
    "several-tiles": (1, [90, 20], 2, 1, 8, 8, 70),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_the_references(case, agree):
    q, k, v, lows, highs = tensors(*case)
    agree(
        lambda q, k, v: _range_attention(q, k, v, lows, highs, 0.4)[0],
        lambda q, k, v: range_attention(q, k, v, lows, highs, scale=0.4, impl="reference"),
        (q, k, v),
    )


def test_float16_goes_through_the_tiles_of_a_gpu(agree):
    q, k, v, lows, highs = tensors(*CASES["compressed"], dtype=torch.float16)
    agree(
        lambda q, k, v: _range_attention(q, k, v, lows, highs, 0.4)[0],
        lambda q, k, v: range_attention(q, k, v, lows, highs, scale=0.4, impl="reference"),
        (q, k, v),
        tol=2e-3,
    )


def test_nothing_is_written_outside_and_everything_inside(monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 4)
    q, k, v, lows, highs = tensors(*CASES["compressed"])
    with Guards() as guards:
        out, lse = kernels.forward(q, k, v, lows, highs, 0.4)
        gradients = kernels.backward(q, k, v, lows, highs, out, lse, out, 0.4)
    guards.check()
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert not out[0, :3].any()  # before the first entry is complete
    assert lse[0, :3].eq(float("inf")).all()


def test_the_filled_part_of_a_cache_is_read_where_it_stands():
    q, _, _, lows, highs = tensors(2, [6], 2, 1, 8, 8, 3)
    k, v = (torch.randn(2, 9, 1, 8) for _ in "kv")
    filled = k[:, :6], v[:, :6]
    room, kept = key_rows(*filled)
    assert room == 9
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (k, v)]
    got = kernels.forward(q, *filled, lows, highs, 0.4)
    want = kernels.forward(q, *(t.contiguous() for t in filled), lows, highs, 0.4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_keys_that_do_not_stand_row_by_row_are_copied():
    k, v = torch.randn(2, 1, 9, 8).transpose(1, 2), torch.randn(2, 9, 1, 8)
    room, kept = key_rows(k[:, :, :, ::2], v)
    assert room == 9
    assert all(t.is_contiguous() for t in kept)


def test_the_op_passes_opcheck():
    q, k, v, lows, highs = tensors(1, [4], 2, 1, 8, 8, 2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    opcheck(torch.ops.fathom.range_attention.default, (*leaves, lows, highs, 0.4))


def test_the_kernels_fit_a_hopper_without_spilling():
    q, k = torch.empty(1, 8, 64, 128, dtype=torch.bfloat16), torch.empty(1, 8, 4, 128)
    sources = []
    for name in kernels.TILES:
        options = kernels.tile(name, q, k, k).options()
        launch = {n: options.pop(n) for n in ("num_warps", "num_stages")}
        arguments = TYPES | kernels.constants(q, k, k) | options
        sources.append(Source(f"fathom.ops.triton.range_attention:_{name}", arguments, launch))
    for built in build(*sources):
        # A few addresses of the epilogue wait on the stack: faster than more warps without.
        assert built.spilled <= (128 if "dkv" in built.kernel else 0), built
        assert built.shared <= SHARED_LIMIT, built
        assert built.wgmma, built


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        (2, [700, 3, 300], 32, 2, 128, 128, 129),
        (1, [1500, 77], 12, 4, 192, 128, None, 16),
        (1, [513], 4, 4, 64, 72, 512),
    ],
    ids=["window", "compressed-odd-group", "one-head-each"],
)
def test_on_a_gpu_it_is_as_exact_as_pytorch_in_the_same_dtype(case, dtype):
    q, k, v, lows, highs = tensors(*case, device="cuda", dtype=dtype)
    dout = torch.randn(*q.shape[:3], v.shape[3], device="cuda", dtype=dtype)

    def run(impl, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = range_attention(*leaves, lows, highs, scale=0.1, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    exact = run("reference", q.double(), k.double(), v.double())
    plain, ours, again = run("torch", q, k, v), run("triton", q, k, v), run("triton", q, k, v)
    for want, same_dtype, got, twice in zip(exact, plain, ours, again, strict=True):
        bound = 2 * (same_dtype - want).abs().max() + 1e-5 * want.abs().max()
        assert (got - want).abs().max() <= bound
        assert torch.equal(got, twice)
