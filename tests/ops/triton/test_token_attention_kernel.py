"""The kernels of attention over selected tokens: interpreted in float32, on a GPU at real tiles."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fathom.ops.token_attention import _token_attention, token_attention, triton_refusal
from fathom.ops.triton import token_attention as kernels
from ops.guards import Guards
from ops.hopper import SHARED_LIMIT, Source, build

SHAPES = {  # B, T, S, H, C, R, N
    "few-heads": (2, 5, 9, 3, 32, 16, 4),
    "more-heads-than-a-tile": (1, 4, 70, 20, 16, 16, 67),
    "one-token": (1, 3, 3, 16, 16, 32, 1),
}


def tensors(shape, device="cpu", dtype=torch.float32) -> tuple[Tensor, ...]:
    """Distinct tokens in any order, some of them none; one query has none at all."""
    batch, length, keys, heads, latent, rope, chosen = shape
    q = torch.randn(batch, length, heads, latent + rope, device=device, dtype=dtype)
    k = torch.randn(batch, keys, latent + rope, device=device, dtype=dtype)
    selected = torch.rand(batch, length, keys, device=device).argsort(-1)[..., :chosen]
    selected[torch.rand(selected.shape, device=device) < 0.2] = -1
    selected[0, length // 2] = -1
    return q, k, selected.to(torch.int32)


def kernel(q: Tensor, k: Tensor, selected: Tensor, value_dim: int) -> Tensor:
    return _token_attention(q, k, selected, value_dim, 0.3)[0]


def reference(q: Tensor, k: Tensor, selected: Tensor, value_dim: int) -> Tensor:
    return token_attention(q, k, selected, value_dim=value_dim, scale=0.3, impl="reference")[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_the_references(shape, agree, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 20_000)  # a few queries at a time
    q, k, selected = tensors(shape)
    agree(
        lambda q, k: kernel(q, k, selected, shape[4]),
        lambda q, k: reference(q, k, selected, shape[4]),
        (q, k),
    )


def test_a_query_without_tokens_gives_zeros_and_what_nobody_selected_gets_none():
    shape = SHAPES["few-heads"]
    q, k, selected = tensors(shape)
    selected[:, :, 0] = selected[:, :, 0].where(selected[:, :, 0] != 7, -1)
    selected[selected == 7] = -1
    q, k = q.requires_grad_(), k.requires_grad_()
    out = kernel(q, k, selected, shape[4])
    dq, dk = torch.autograd.grad(out.square().sum(), (q, k))
    nothing = shape[1] // 2
    assert not out[0, nothing].any()
    assert not dq[0, nothing].any()
    assert not dk[:, 7].any()


def test_the_same_inputs_give_the_same_bits():
    shape = SHAPES["few-heads"]
    q, k, selected = tensors(shape)
    q, k = q.requires_grad_(), k.requires_grad_()
    twice = []
    for _ in range(2):
        out = kernel(q, k, selected, shape[4])
        twice.append((out, *torch.autograd.grad(out.square().sum(), (q, k))))
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_nothing_is_written_outside_of_what_is_allocated(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 20_000)
    shape = SHAPES["more-heads-than-a-tile"]
    q, k, selected = tensors(shape)
    with Guards() as guards:
        out, lse = kernels.forward(q, k, selected, shape[4], 0.3)
        dq, dk = kernels.backward(out[0], q[0], k[0], selected[0], out[0], lse[0], 0.3)
    guards.check()
    assert all(t.isfinite().all() for t in (out, dq, dk))


def test_the_filled_part_of_a_cache_is_read_where_it_stands():
    q, k, selected = tensors(SHAPES["few-heads"])
    cache = torch.cat([k, torch.full_like(k, torch.nan)], dim=1)
    got = kernels.forward(q, cache[:, : k.shape[1]], selected, 32, 0.3)
    want = kernels.forward(q, k, selected, 32, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_torch_sees_the_op_as_it_is():
    shape = SHAPES["few-heads"]
    q, k, selected = tensors(shape)
    inputs = q.requires_grad_(), k.requires_grad_(), selected, shape[4], 0.3
    opcheck(_token_attention, inputs)


@pytest.mark.parametrize(
    ("width", "value_dim", "words"),
    [(48, 32, ""), (40, 32, "16, 32, 64"), (72, 24, "16, 32, 64")],
    ids=["fits", "narrow-rope", "odd-latent"],
)
def test_the_kernel_says_what_it_needs(width, value_dim, words):
    q, k = torch.empty(1, 1, 2, width), torch.empty(1, 4, width)
    selected = torch.zeros(1, 1, 2, dtype=torch.int32)
    reason = triton_refusal("cuda", torch.bfloat16, q, k, k[..., :value_dim], selected)
    assert words in reason
    assert bool(words) == bool(reason)
    assert "bfloat16 or float16" in triton_refusal("cuda", torch.float32)
    assert "CUDA tensors" in triton_refusal("cpu", torch.bfloat16)


TYPES = {
    **dict.fromkeys(("q", "k", "out", "dout", "dq", "slopes", "shares"), "*bf16"),
    **dict.fromkeys(("lse", "delta", "dk"), "*fp32"),
    **dict.fromkeys(("scale", "scale_log2"), "fp32"),
    **dict.fromkeys(("order", "ends"), "*i64"),
    "selected": "*i32",
    "n_selected": "i32:16",
    "T": "i32:16",
    "room": "i32:16",
}


def source(name: str, n_heads: int) -> Source:
    """A kernel as it runs at DeepSeek-V3.2's widths."""
    function = getattr(kernels, f"_{name}")
    sizes = {"H": n_heads, "C": 512, "R": 64}
    if name == "add_lists":
        sizes |= {"ENTRIES": kernels.ENTRIES}
        options = {"num_warps": 4}
    else:
        options = kernels.tile(name, torch.bfloat16, n_heads).options(*kernels.NAMES)
        sizes |= {key: options.pop(key) for key in ("HEADS", "TOKENS")}
    names = [p.name for p in function.params] if hasattr(function, "params") else []
    names = names or list(function.fn.__code__.co_varnames[: function.fn.__code__.co_argcount])
    arguments = {name: sizes[name] if name in sizes else TYPES[name] for name in names}
    return Source(f"{kernels.__name__}:_{name}", arguments, options)


def test_they_compile_for_hopper_without_spilling():
    names = [(name, heads) for name in ("forward", "slopes", "dq") for heads in (16, 128)]
    built = build(*(source(*each) for each in names), source("add_lists", 128))
    for kernel in built:
        # A few addresses wait on the stack, and of few heads (no wgmma) some rows of the slopes.
        assert kernel.spilled <= (64 if kernel.wgmma else 256), kernel
        assert kernel.shared <= SHARED_LIMIT, kernel
    assert all(
        kernel.wgmma for kernel, (_, heads) in zip(built, names, strict=False) if heads == 128
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [16, 128])
def test_on_a_gpu_values_and_gradients_are_the_references(heads, dtype):
    shape = 2, 70, 300, heads, 512, 64, 131
    q, k, selected = tensors(shape, "cuda", dtype)
    grad = torch.randn(2, 70, heads, 512, device="cuda", dtype=dtype)
    leaves = q.requires_grad_(), k.requires_grad_()
    out = kernel(*leaves, selected, 512)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = reference(*wide, selected, 512)
    wanted = [want, *torch.autograd.grad(want, wide, grad.double())]
    for a, b in zip(got, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2
