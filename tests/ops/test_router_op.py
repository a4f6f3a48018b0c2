"""The router's product and choice: exact whatever the dtype, and the same on every device."""

import pytest
import torch
from torch.library import opcheck

from fathom.ops.router import best_experts, router_logits


def test_logits_are_as_wide_as_sums_are():
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        got = router_logits(x.to(dtype), w.to(dtype))
        assert got.dtype == wide
        torch.testing.assert_close(got, x.to(dtype).to(wide) @ w.to(dtype).to(wide).T)


def test_bfloat16_units_are_refused_where_they_would_lose_digits():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"needs bfloat16 on CUDA, got torch\.float32 on cpu"):
        router_logits(x, x, impl="torch")


def test_a_token_stays_in_its_best_groups():
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.1, 0.2]])
    options = {"n_groups": 3, "n_kept": 1}
    assert best_experts(scores, 2, **options).tolist() == [[0, 1]]  # by the best of each
    assert best_experts(scores, 2, **options, top_two=True).tolist() == [[3, 2]]  # by two
    assert best_experts(scores, 2).tolist() == [[0, 3]]


@pytest.mark.parametrize("groups", [(1, 1, False), (2, 1, True)])
def test_the_choice_passes_opcheck(groups):
    opcheck(torch.ops.fathom.best_experts.default, (torch.randn(5, 6), 2, *groups, "reference"))


@pytest.mark.gpu
def test_on_cuda_bfloat16_factors_lose_nothing_either_way():
    x, w = (torch.randn(n, 512, device="cuda").bfloat16() for n in (300, 64))
    grad = torch.randn(300, 64, device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        out = router_logits(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    (out, dx, dw), exact = found
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-4)
    for a, b in zip((dx, dw), exact[1:], strict=True):
        rounded = b.to(torch.bfloat16).double()  # one rounding of the exact result
        assert (a.double() - b).norm() <= 1.05 * (rounded - b).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("limits", [(1, 1, False), (8, 4, True)])
def test_on_cuda_the_kernel_chooses_as_the_cpu_does(limits):
    scores = torch.randn(1000, 64).mul(4).round().div(4)  # many ties
    groups, kept, two = limits
    options = {"n_groups": groups, "n_kept": kept, "top_two": two}
    got = best_experts(scores.cuda(), 6, **options, impl="triton")
    assert torch.equal(got.cpu(), best_experts(scores, 6, **options))
