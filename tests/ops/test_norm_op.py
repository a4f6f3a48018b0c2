"""RMSNorm: the definition, its gradients, and the order of the casts."""

import pytest
import torch

from fathom.ops.norm import rms_norm, rms_norm_reference

EPS = 1e-3


def definition(x, weight):
    return torch.stack([row / (row.dot(row) / len(row) + EPS).sqrt() * weight for row in x])


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (65, 64)])
def test_values_and_gradients_are_the_definitions(norm, rows, width, agree, device):
    inputs = (3 * torch.randn(rows, width, device=device), torch.randn(width, device=device))
    agree(lambda x, w: norm(x, w, EPS), definition, inputs)


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
def test_gradients_agree_with_finite_differences(norm):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: norm(*a, EPS), (x, weight))


def test_rows_that_do_not_lie_side_by_side_are_taken(agree):
    weight = torch.randn(6)
    slices = torch.randn(4, 5, 9)[..., :6]
    turned = torch.randn(6, 4).T
    for x in (slices, turned):
        agree(
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: rms_norm_reference(x.contiguous(), w, EPS),
            (x, weight),
        )


def test_bfloat16_returns_to_bfloat16_before_the_weight_multiplies():
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    wide = x.float()
    factor = 1 / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    want = torch.tensor([(wide * factor).bfloat16().tolist()]).bfloat16()[0] * weight
    got = rms_norm(x, weight, EPS)
    assert got.dtype == torch.bfloat16
    assert (got != want).float().mean() < 0.001  # 1/sqrt and rsqrt may differ in the last bit
    late = torch.nn.functional.rms_norm(x, (128,), weight, EPS)
    assert (got != late).float().mean() > 0.1


def test_a_float32_weight_keeps_its_precision_on_bfloat16_activations():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    got = rms_norm(x, weight, EPS)
    assert got.dtype == torch.float32
    assert torch.equal(got, weight * rms_norm(x, torch.ones(8).bfloat16(), EPS))


def test_no_rows_give_no_rows_and_a_zero_weight_gradient():
    x, weight = torch.empty(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    out = rms_norm(x, weight, EPS)
    out.sum().backward()
    assert out.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(4))


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient():
    x, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(4)
    out = rms_norm(x, weight, EPS)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4))
    torch.testing.assert_close(x.grad, torch.full((2, 4), EPS**-0.5))
