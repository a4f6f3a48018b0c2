"""A kernel that is wrong, or that raises, is not taken by itself; one that is asked for runs."""

from importlib import import_module

import pytest
import torch

from fathom.ops import proof
from fathom.ops.proof import PROVEN, proves, settle
from fathom.ops.registry import HAS_TRITON

CPU = torch.device("cpu")
adamw = import_module("fathom.ops.adamw")
experts = import_module("fathom.ops.experts")  # the package has functions of these names
cross_entropy = import_module("fathom.ops.cross_entropy")


@pytest.fixture(autouse=True)
def _nothing_is_known_yet():
    proves.cache_clear()
    yield
    proves.cache_clear()


def right(device):
    yield torch.ones(3).bfloat16(), torch.ones(3, dtype=torch.float64)


def wrong(device):
    yield from right(device)
    yield torch.tensor([1.0, 1.03]), torch.ones(2, dtype=torch.float64)


def unwritten(device):
    yield torch.full((2,), torch.nan), torch.ones(2, dtype=torch.float64)


def broken(device):
    raise RuntimeError("no such instruction")


def test_a_right_kernel_is_taken_and_checked_once():
    calls = []

    def check(device):
        calls.append(device)
        return right(device)

    assert [settle(PROVEN, check, CPU) for _ in range(3)] == ["triton"] * 3
    assert calls == [CPU]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (wrong, "relative error of 0.021"),
        (unwritten, "relative error of inf"),
        (broken, "raised RuntimeError: no such instruction"),
    ],
)
def test_a_kernel_that_fails_is_left_to_pytorch_and_said(check, words):
    with pytest.warns(UserWarning, match=words):
        assert settle(PROVEN, check, CPU) == "torch"


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_is_asked_for_is_not_checked(impl):
    assert settle(impl, broken, CPU) == impl


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="kernels are interpreted without CUDA"
)
@pytest.mark.parametrize("op", [adamw, experts, cross_entropy])
def test_the_checks_of_the_kernels_pass_in_float32(op, monkeypatch):
    def wide(*shape, device, dtype=None):
        return random(*shape, device=device, dtype=torch.float32)

    random = proof.random
    monkeypatch.setattr(op, "random", wide)
    assert all(proof._error(got, want) < 1e-5 for got, want in op._check(CPU))


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="kernels are interpreted without CUDA"
)
def test_the_check_of_adamws_roundings_passes_and_finds_rounding_to_the_nearest(monkeypatch):
    errors = [proof._error(got, want) for got, want in adamw._check_rounding(CPU)]
    assert max(errors) < 1e-3
    kernel = adamw._adamw
    monkeypatch.setattr(adamw, "_adamw", lambda *args: kernel(*args[:-2], [], None))
    errors = [proof._error(got, want) for got, want in adamw._check_rounding(CPU)]
    assert min(errors) > 0.1


@pytest.mark.parametrize("proven", [True, False])
def test_a_loss_whose_kernel_failed_has_the_same_gradients(proven, monkeypatch):
    monkeypatch.setattr(cross_entropy, "settle", lambda impl, *_: "torch" if proven else impl)
    x, w = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets = torch.arange(9) % 7
    impl = PROVEN if proven else "torch"
    loss, *_ = cross_entropy._linear_cross_entropy(x, w, targets, 2**20, -100, True, True, impl)
    found = torch.autograd.grad(loss, (x, w))
    whole = torch.nn.functional.cross_entropy(x @ w.T, targets, reduction="sum")
    want = torch.autograd.grad(whole, (x, w))
    torch.testing.assert_close(found, want)


CHECKS = ["adamw._check", "adamw._check_rounding"]
CHECKS += ["experts._check", "cross_entropy._check", "router._check"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_prove_themselves_here(name):
    op, _, check = name.partition(".")
    device = torch.device("cuda", torch.cuda.current_device())
    assert proves(getattr(import_module(f"fathom.ops.{op}"), check), device)
