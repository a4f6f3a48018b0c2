"""Shared by the tests of ops: unwritten memory is NaN, and one way to compare with float64."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

Function = Callable[..., Tensor]

collect_ignore_glob = [] if find_spec("triton") else ["triton/*", "test_hopper.py"]


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the CPU; operations that PyTorch calls nondeterministic are then errors too."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(request.node.get_closest_marker("gpu") is None)
    yield
    torch.use_deterministic_algorithms(False)


def values_and_gradients(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    wanted = [t for t in leaves if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


@pytest.fixture
def agree() -> Callable[..., None]:
    """``agree(got, want, inputs)``: values and gradients of ``got`` are ``want``'s in float64."""

    def check(got: Function, want: Function, inputs: tuple[Tensor, ...], tol: float = 1e-5) -> None:
        if inputs[0].is_cuda:
            tol = 1e-3  # float32 kernels may multiply in TF32
        found = values_and_gradients(got, inputs)
        doubled = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        expected = values_and_gradients(want, doubled)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol * (1 + scale(b)))

    return check


def scale(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
