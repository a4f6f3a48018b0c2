"""All ops in one graph: torch.compile without a break, meta tensors, and equal numbers."""

import pytest
import torch
from torch import Tensor

from fathom.ops import (
    attention,
    combine,
    gather,
    grouped_mm,
    linear_cross_entropy,
    rms_norm,
    rotate,
    sort_by_expert,
    token_cross_entropy,
)

B, T, H, D, E, K, V = 2, 6, 2, 16, 3, 2, 11


def weights(device="cpu", dtype=torch.float32):
    shapes = {"norm": (D,), "qkv": (4 * D // 2, D), "experts": (E, D, D), "head": (V, D)}
    return {
        name: (0.3 * torch.randn(shape, device=device, dtype=dtype)).requires_grad_()
        for name, shape in shapes.items()
    }


def inputs(device="cpu", dtype=torch.float32):
    angle = torch.rand(B, T, 1, D // H // 2, device=device)
    targets = torch.zeros(B * T, dtype=torch.int64, device=device)
    return torch.randn(B, T, D, device=device, dtype=dtype), angle, targets


def block(
    x_BTD: Tensor, angle: Tensor, targets: Tensor, w: dict[str, Tensor], masked: bool
) -> Tensor:
    q, kv = (rms_norm(x_BTD, w["norm"], 1e-5) @ w["qkv"].T).split([D, D], dim=-1)
    q, kv = q.unflatten(-1, (H, -1)), kv.unflatten(-1, (H, -1))
    q, k = (rotate(t, angle.cos(), angle.sin()) for t in (q, kv[:, :, :1]))
    v = kv[:, :, 1:]
    if masked:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(
            -1
        )  # the first sees nothing
        mixed = attention(q, k, v, scale=0.3, mask=mask)
    else:
        mixed = attention(q, k, v, scale=0.3, causal=True)
    x_ND = (x_BTD + mixed.flatten(-2)).flatten(0, 1)
    gates, ids = (x_ND[:, :E] + 0.01).topk(K, dim=-1)
    permutation = sort_by_expert(ids, E)
    rows = grouped_mm(gather(x_ND, permutation, K), w["experts"].mT, permutation.ends)
    x_ND = x_ND + combine(rows, gates, permutation)
    with torch.no_grad():
        watched = token_cross_entropy(x_ND, w["head"], targets).sum()
    return linear_cross_entropy(x_ND, w["head"], targets) + 0 * watched


def loss_and_gradients(function, masked):
    torch.manual_seed(3)
    x, angle, targets = inputs()
    w = weights()
    loss = function(x.requires_grad_(), angle, targets, w, masked)
    loss.backward()
    return [loss.detach(), x.grad, *(t.grad for t in w.values())]


def check(backend: str, masked: bool) -> None:
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    found, want = loss_and_gradients(compiled, masked), loss_and_gradients(block, masked)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_of_all_ops_has_eager_numbers(masked):
    check("aot_eager", masked)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_inductor_has_eager_numbers(masked):
    check("inductor", masked)


def test_bf16_autocast_compiles_to_one_graph():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    losses = []
    for function in (block, compiled):
        torch.manual_seed(3)
        arguments, w = inputs(), weights()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(function(*arguments, w, False))
    torch.testing.assert_close(losses[0], losses[1])


def test_meta_tensors_run_forward_and_backward():
    w = weights("meta")
    loss = block(*inputs("meta"), w, masked=False)
    loss.backward()
    assert loss.shape == ()
    assert all(t.grad.shape == t.shape for t in w.values())


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_compiles_to_one_graph(masked):
    compiled = torch.compile(block, fullgraph=True)
    losses = []
    for function in (block, compiled):
        torch.manual_seed(3)
        w = weights("cuda", torch.bfloat16)
        loss = function(*inputs("cuda", torch.bfloat16), w, masked)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=3e-2, atol=1e-1)
