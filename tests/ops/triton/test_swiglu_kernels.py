"""The gated SwiGLU's kernels: PyTorch's numbers, no element unwritten, none written outside."""

import pytest
import torch

from fathom.ops import swiglu
from fathom.ops.triton import swiglu as kernels

SHAPES = [(1, 1), (3, 8), (kernels.ROWS, kernels.COLUMNS), (33, 200), (0, 8)]


def inputs(rows, width, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    h, da = (torch.randn(rows, w, device=device, dtype=dtype) for w in (2 * width, width))
    return h, torch.rand(rows, device=device), torch.randperm(rows, device=device), da


def close(got, want, h, da, gates, order):
    """As close to float64 as plain PyTorch in the same dtype, twice over."""
    exact = want(h.double(), gates.double(), order, da.double())
    plain = want(h, gates, order, da.clone())
    for a, b, c in zip(got, plain, exact, strict=True):
        error, plain_error = (t.double().sub(c).norm() for t in (a, b))
        assert error <= 2 * plain_error + 1e-6 * c.norm()


def both_ways(module):
    def run(h, gates, order, da):
        return module.swiglu(h, gates, order), *module.swiglu_backward(h, gates, order, da)

    return run


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_values_and_gradients_are_as_exact_as_pytorchs(rows, width, device):
    h, gates, order, da = inputs(rows, width, device)
    got = both_ways(kernels)(h, gates, order, da.clone())
    close(got, both_ways(swiglu), h, da, gates, order)


def test_the_definition_has_the_gradients_of_autograd():
    h, gates, order, da = inputs(5, 6, torch.device("cpu"))
    h, gates = h.double().requires_grad_(), gates.double().requires_grad_()
    gate, up = h.chunk(2, dim=-1)
    a = torch.nn.functional.silu(gate) * up * gates[order][:, None]
    want = torch.autograd.grad(a, (h, gates), da.double())
    dh, dgates, again = swiglu.swiglu_backward(h.detach(), gates.detach(), order, da.double())
    torch.testing.assert_close((dh, dgates), want)
    torch.testing.assert_close(again, a.detach())
    torch.testing.assert_close(swiglu.swiglu(h, gates, order), a)


def test_nothing_outside_is_written_and_the_inputs_are_left(device):
    h, gates, order, _ = inputs(19, 136, device)
    guard = torch.full((19 + 2, 136), 7.0, device=device, dtype=h.dtype)
    before = [t.clone() for t in (h, gates, order)]
    kernels.swiglu_backward(h, gates, order, guard[1:20])
    assert torch.equal(guard[[0, 20]], torch.full_like(guard[:2], 7.0))
    assert all(torch.equal(a, b) for a, b in zip((h, gates, order), before, strict=True))
