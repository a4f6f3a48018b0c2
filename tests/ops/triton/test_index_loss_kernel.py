"""The kernels of the indexer's loss: interpreted in float32, on a GPU at their real tiles."""

import pytest
import torch
from torch import Tensor

from fathom.ops.indexer import index_loss, index_topk, loss_refusal
from fathom.ops.token_attention import _token_attention
from fathom.ops.triton import index_loss as kernels
from ops.guards import Guards
from ops.hopper import SHARED_LIMIT, Source, build

SHAPES = {  # B, T, J, W, H, F, N
    "few-heads": (2, 5, 3, 32, 3, 48, 4),
    "more-heads-than-a-tile": (1, 9, 17, 32, 20, 32 + 16, 7),
}


def tensors(shape, device="cpu", dtype=torch.float32) -> tuple[Tensor, ...]:
    """Index queries, keys and weights; main queries and keys; the selection."""
    batch, length, heads, width, main_heads, main_width, chosen = shape
    q = torch.randn(batch, length, heads, width, device=device, dtype=dtype)
    k = torch.randn(batch, length, width, device=device, dtype=dtype)
    weight = torch.randn(batch, length, heads, device=device) / (heads * width) ** 0.5
    main_q = torch.randn(batch, length, main_heads, main_width, device=device, dtype=dtype)
    main_k = torch.randn(batch, length, 1, main_width, device=device, dtype=dtype)
    at = torch.arange(length, device=device).expand(batch, -1)
    return q, k, weight, main_q, main_k, index_topk(q, k, weight, at, at * 0, topk=chosen)


def loss_and_gradients(
    inputs: tuple[Tensor, ...], impl: str, monkeypatch, known: bool = False
) -> list[Tensor]:
    """``known``: with the log-sum-exp that the main attention's own kernel gives."""
    *floats, selected = inputs
    lse = None
    if known:
        lse = _token_attention(floats[3], floats[4][:, :, 0], selected, 32, 0.3)[1]
    if impl == "triton":  # also where tensors are on the CPU and kernels are interpreted
        monkeypatch.setattr("fathom.ops.indexer.choose", lambda *_: "triton")
    leaves = [t.clone().requires_grad_() for t in floats[:3]]
    at = torch.arange(floats[0].shape[1], device=selected.device).expand(selected.shape[:2])
    loss = index_loss(
        *leaves, *floats[3:], at, at * 0, scale=0.3, selected_BTN=selected, main_lse_BTH=lse
    )
    monkeypatch.undo()
    return [loss, *torch.autograd.grad(3 * loss, leaves)]


@pytest.mark.parametrize("known", [False, True], ids=["alone", "after-the-attention"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_are_the_references(shape, known, monkeypatch):
    inputs = tensors(shape)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 30_000)  # a few queries at a time
    found = loss_and_gradients(inputs, "triton", monkeypatch, known)
    *floats, selected = inputs
    wide = (*(t.double() for t in floats), selected)
    want = loss_and_gradients(wide, "reference", monkeypatch)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    *floats, selected = tensors(SHAPES["few-heads"])
    at = torch.arange(5).expand(2, -1)
    with torch.no_grad():
        want = index_loss(*floats, at, at * 0, scale=0.3, selected_BTN=selected)
        monkeypatch.setattr("fathom.ops.indexer.choose", lambda *_: "triton")
        found = index_loss(*floats, at, at * 0, scale=0.3, selected_BTN=selected)
    torch.testing.assert_close(found, want)


def test_nothing_is_written_outside_of_what_is_allocated(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 30_000)
    q, k, weight, main_q, main_k, selected = tensors(SHAPES["more-heads-than-a-tile"])
    main = main_q[0], main_k[0, :, 0], selected[0].contiguous()
    with Guards() as guards:
        loss, gradients = kernels.index_loss(q[0], k[0], weight[0], *main, None, 0.3, True)
    guards.check()
    assert all(t.isfinite().all() for t in (loss, *gradients))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"width": 24}, "32, 64, 128"),
        ({"groups": 2}, "one main key"),
        ({"main_width": 64}, "one main key"),
        ({"selected": False}, "selected tokens"),
    ],
    ids=["fits", "odd-width", "grouped-keys", "one-power-of-two", "all-tokens"],
)
def test_the_kernels_say_what_they_need(changes, words):
    sizes = {"width": 32, "groups": 1, "main_width": 48, "selected": True, **changes}
    q, k = torch.empty(1, 2, 3, sizes["width"]), torch.empty(1, 2, sizes["width"])
    main_q = torch.empty(1, 2, 4, sizes["main_width"])
    main_k = torch.empty(1, 2, sizes["groups"], sizes["main_width"])
    tokens = (torch.zeros(1, 2, 1, dtype=torch.int32),) if sizes["selected"] else ()
    reason = loss_refusal("cuda", torch.bfloat16, q, k, main_q, main_k, *tokens)
    assert words in reason
    assert bool(words) == bool(reason)


TYPES = {
    **dict.fromkeys(("q", "k", "shares"), "*bf16"),
    **dict.fromkeys(("weight", "mass", "scores", "slopes", "dq", "dweight"), "*fp32"),
    "lse": "*fp32",
    "selected": "*i32",
    "n_selected": "i32:16",
    "scale_log2": "fp32",
}


def source(name: str, tile: str, heads: int) -> Source:
    options = kernels.tile(tile, torch.bfloat16, heads).options(*kernels.NAMES)
    sizes = {key: options.pop(key) for key in ("HEADS", "TOKENS")}
    sizes |= {"KNOWN": heads == 128, "H": heads, "C": 512, "R": 64, "J": heads, "W": 128}
    code = getattr(kernels, name).fn.__code__
    names = code.co_varnames[: code.co_argcount]
    arguments = {name: sizes[name] if name in sizes else TYPES[name] for name in names}
    return Source(f"{kernels.__name__}:{name}", arguments, options)


def test_they_compile_for_hopper_without_spilling():
    built = build(
        source("_mass", "mass", 128),
        source("_mass", "mass", 64),  # makes the log-sum-exp itself
        source("_index_scores", "index", 64),
        source("_index_gradients", "index", 64),
    )
    for kernel in built:
        assert kernel.wgmma, kernel
        assert not kernel.spilled, kernel
        assert kernel.shared <= SHARED_LIMIT, kernel


@pytest.mark.gpu
def test_on_a_gpu_loss_and_gradients_are_the_references(monkeypatch):
    inputs = tensors((2, 300, 64, 128, 128, 576, 130), "cuda", torch.bfloat16)
    found = loss_and_gradients(inputs, "triton", monkeypatch)
    *floats, selected = inputs
    wide = (*(t.double() for t in floats), selected)
    want = loss_and_gradients(wide, "reference", monkeypatch)
    for a, b in zip(found, want, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-2
