"""The loss by the kernel: as exact as PyTorch's, whatever the chunks; no other row is touched."""

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import cross_entropy

from fathom.ops.cross_entropy import (
    NARROW_SUMS,
    _by_kernel,
    _token_cross_entropy,
    linear_cross_entropy,
)
from fathom.ops.triton.cross_entropy import BLOCK, losses_and_slopes


def dtype_of(device):
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@pytest.mark.parametrize("width", [1, 7, 1000, BLOCK, BLOCK + 1])
def test_losses_and_slopes_are_those_of_autograd_in_float64(width, device):
    logits = (3 * torch.randn(5, width, device=device)).to(dtype_of(device))
    targets = torch.randint(0, width, (5,), device=device)
    targets[2] = -100
    wide = logits.double().requires_grad_()
    want = cross_entropy(wide, targets, reduction="none", ignore_index=-100)
    (slopes,) = torch.autograd.grad(want.sum(), wide)
    losses = torch.empty(5, device=device)
    guarded = torch.full((7, width), 7.0, device=device, dtype=logits.dtype)
    guarded[1:6] = logits
    losses_and_slopes(guarded[1:6], targets, losses, -100, slopes=False)
    assert torch.equal(guarded[1:6], logits)
    losses_and_slopes(guarded[1:6], targets, losses, -100, slopes=True)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if logits.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(guarded[1:6].double(), slopes, rtol=tolerance, atol=1e-6)
    assert torch.equal(guarded[[0, 6]], torch.full_like(guarded[:2], 7.0))


def test_a_sure_tokens_slope_keeps_its_digits(device):
    logits = torch.tensor([[20.0, 0.0]], device=device).to(dtype_of(device))
    losses_and_slopes(
        logits,
        torch.zeros(1, dtype=torch.int64, device=device),
        losses := (torch.empty(1, device=device)),
        -100,
        slopes=True,
    )
    doubt = torch.sigmoid(torch.tensor(-20.0, dtype=torch.float64)).item()
    assert logits[0].tolist() == pytest.approx([-doubt, doubt], rel=2**-8)
    assert losses.item() < 1e-6


@pytest.mark.parametrize("tokens", [0, 1, 40, 16 * NARROW_SUMS + 1])
def test_the_whole_op_by_the_kernel_agrees_with_float64(tokens, device):
    dtype = dtype_of(device)
    x, w = (torch.randn(n, 16, device=device).to(dtype) for n in (tokens, 33))
    targets = torch.randint(0, 33, (tokens, 2), device=device)[:, 1]  # with a stride of its own
    limit = 16 * 33 * dtype.itemsize  # chunks of 16 rows
    loss, dx, dw = _by_kernel(x, w, targets, limit, -100, True, True)
    wide = [t.double().requires_grad_() for t in (x, w)]
    want = linear_cross_entropy(*wide, targets)
    expected = torch.autograd.grad(want, wide)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    for a, b in zip((dx, dw), expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    losses = _token_cross_entropy(x, w, targets, limit, -100, "triton")
    assert losses.sum().item() == pytest.approx(want.item(), rel=tolerance)


def test_the_op_passes_opcheck(device):
    x, w = (torch.randn(n, 16, device=device, dtype=dtype_of(device)) for n in (9, 33))
    targets = torch.randint(0, 33, (9,), device=device)
    opcheck(torch.ops.fathom.token_cross_entropy.default, (x, w, targets, 1000, -100, "triton"))
    inputs = (x.requires_grad_(), w.requires_grad_(), targets, 1000, -100, True, True, "triton")
    opcheck(torch.ops.fathom.linear_cross_entropy.default, inputs)


@pytest.mark.gpu
def test_on_cuda_gradients_are_no_less_exact_than_those_of_pytorch_and_repeat_themselves():
    x, w = (torch.randn(n, 256, device="cuda").bfloat16() for n in (2000, 5000))
    targets = torch.randint(0, 5000, (2000,), device="cuda")
    limit = 500 * 5000 * 2
    first = _by_kernel(x, 0.1 * w, targets, limit, -100, True, True)
    again = _by_kernel(x, 0.1 * w, targets, limit, -100, True, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    found = []
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, 0.1 * w)]
        logits = (leaves[0] @ leaves[1].T).to(wide)
        loss = cross_entropy(logits, targets, reduction="sum")
        found.append(torch.autograd.grad(loss, leaves))
    for ours, plain, exact in zip(first[1:], *found, strict=True):
        error, plain_error = ((t.double() - exact).norm() for t in (ours, plain))
        assert error <= 2 * plain_error
