"""Rotation of channel pairs: complex multiplication, undone by the opposite angle."""

import pytest
import torch

from fathom.ops.rope import rotate


def angles(batch=2, length=5, pairs=3, dtype=torch.float32, device=None):
    angle = torch.randn(batch, length, 1, pairs, dtype=torch.float64).to(device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def by_complex_numbers(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("pairs", [1, 3, 16])
def test_values_and_gradients_are_those_of_complex_multiplication(heads, pairs, agree, device):
    cos, sin = angles(pairs=pairs, device=device)
    agree(
        rotate, by_complex_numbers, (torch.randn(2, 5, heads, 2 * pairs, device=device), cos, sin)
    )


def test_gradients_agree_with_finite_differences():
    x = torch.randn(2, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x, *angles(dtype=torch.float64)))


def test_the_opposite_angle_undoes_it_and_lengths_stay():
    x, (cos, sin) = torch.randn(2, 5, 4, 6, dtype=torch.float64), angles(dtype=torch.float64)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(rotate(turned, cos, -sin), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_one_row_of_angles_serves_every_sequence():
    x, (cos, sin) = torch.randn(3, 5, 2, 6), angles(batch=1)
    assert torch.equal(rotate(x, cos, sin)[2:], rotate(x[2:], cos, sin))


def test_bfloat16_is_rounded_once_after_a_float32_rotation():
    x, (cos, sin) = torch.randn(2, 5, 4, 6).bfloat16(), angles()
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def test_a_slice_of_wider_heads_is_taken():
    wide, (cos, sin) = torch.randn(2, 5, 4, 16), angles()
    assert torch.equal(rotate(wide[..., 10:], cos, sin), rotate(wide[..., 10:].clone(), cos, sin))
