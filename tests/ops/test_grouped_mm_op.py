"""Grouped matmul: every implementation, both ways, against a product per row in float64."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fathom.ops.grouped_mm import aligned, grouped_mm, grouped_outer_reference

IMPLS = ["auto", "reference", "torch"]
ROWS = {
    "one-row": [1],
    "ragged": [1, 129, 63],
    "empty-experts": [0, 7, 0, 0, 5, 0],
    "all-to-one": [0, 0, 40],
}


def routed(rows, dim=8, out=12, *, stored_out_first=False, device="cpu", dtype=torch.float32):
    """x, w, ends, and each row's expert."""
    sizes = torch.tensor(rows)
    x = torch.randn(int(sizes.sum()), dim, device=device, dtype=dtype)
    shape = (len(rows), out, dim) if stored_out_first else (len(rows), dim, out)
    w = torch.randn(shape, device=device, dtype=dtype)
    ends = sizes.cumsum(0).to(device, torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(rows)), sizes).to(device)
    return x, w.mT if stored_out_first else w, ends, owner


def row_by_row(owner):
    return lambda x, w, ends: torch.einsum("nd,ndf->nf", x, w[owner])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stored_out_first", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_values_and_gradients_are_those_of_a_product_per_row(impl, stored_out_first, rows, agree):
    x, w, ends, owner = routed(rows, stored_out_first=stored_out_first)
    agree(lambda *a: grouped_mm(*a, impl=impl), row_by_row(owner), (x, w, ends))


@pytest.mark.parametrize(("dim", "out"), [(1, 1), (7, 8), (8, 5)])
def test_odd_widths_are_taken_by_auto_and_refused_by_torch(dim, out, agree):
    x, w, ends, owner = routed([3, 0, 4], dim, out)
    agree(grouped_mm, row_by_row(owner), (x, w, ends))
    with pytest.raises(ValueError, match="rows of whole 16-byte units"):
        grouped_mm(x, w, ends, impl="torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_with_strides_of_their_own_are_taken(impl, agree):
    _, w, ends, owner = routed([3, 0, 6])
    padded, turned, offset = torch.randn(9, 11)[:, :8], torch.randn(8, 9).T, torch.randn(73)[1:]
    repeated = torch.randn(1, 8).expand(9, 8)
    for x in (padded, turned, offset.view(9, 8), repeated):
        agree(lambda *a: grouped_mm(*a, impl=impl), row_by_row(owner), (x, w, ends))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_expanded_gradient_is_taken(impl):
    x, w, ends, owner = routed([3, 2])
    x.requires_grad_()
    grouped_mm(x, w, ends, impl=impl).sum().backward()
    torch.testing.assert_close(x.grad, w[owner].sum(-1))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_no_rows_and_zero_weight_gradients(impl):
    x, w, ends, _ = routed([0, 0])
    w.requires_grad_()
    out = grouped_mm(x, w, ends, impl=impl)
    out.sum().backward()
    assert out.shape == (0, 12)
    assert torch.equal(w.grad, torch.zeros(2, 8, 12))


def test_float64_gradients_agree_with_finite_differences():
    x, w, ends, _ = routed([2, 0, 3], 3, 4, dtype=torch.float64)
    inputs = (x.requires_grad_(), w.requires_grad_(), ends)
    assert torch.autograd.gradcheck(grouped_mm, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_rounded_once(impl, device):
    x, w, ends, owner = routed([40, 0, 33], 64, 32, device=device, dtype=torch.bfloat16)
    got = grouped_mm(x, w, ends, impl=impl)
    want = row_by_row(owner)(x.double(), w.double(), ends)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("stored_out_first", [False, True])
def test_the_weights_gradient_has_the_layout_of_the_weight(stored_out_first):
    x, w, ends, _ = routed([3, 2], stored_out_first=stored_out_first)
    w.requires_grad_()
    (dw,) = torch.autograd.grad(grouped_mm(x, w, ends).sum(), w)
    assert dw.stride() == w.stride()


def test_only_the_gradients_that_are_wanted_are_computed():
    x, w, ends, _ = routed([3, 2])
    with FlopCounterMode(display=False) as counter:
        grouped_mm(x.requires_grad_(), w, ends).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 8 * 12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_flops_are_those_of_the_rows_whoever_owns_them(impl, rows):
    x, w, ends, _ = routed(rows)
    x.requires_grad_()
    w.requires_grad_()
    one = 2 * sum(rows) * 8 * 12
    with FlopCounterMode(display=False) as forward:
        out = grouped_mm(x, w, ends, impl=impl)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (one, 2 * one)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("stored_out_first", [False, True])
def test_the_ops_pass_opcheck(impl, stored_out_first):
    x, w, ends, _ = routed([3, 0, 5], stored_out_first=stored_out_first)
    inputs = (x.requires_grad_(), w.requires_grad_(), ends, impl)
    opcheck(torch.ops.fathom.grouped_mm.default, inputs)
    opcheck(torch.ops.fathom.grouped_outer.default, (x.detach(), x.detach() + 1, ends, impl))


def test_the_outer_product_is_the_sum_over_an_experts_rows():
    x, _, ends, owner = routed([3, 0, 5])
    y = torch.randn(8, 4)
    want = torch.zeros(3, 8, 4).index_add_(0, owner, x[:, :, None] * y[:, None])
    torch.testing.assert_close(grouped_outer_reference(x, y, ends), want)


def test_aligned_copies_only_what_a_kernel_could_misread():
    x = torch.randn(6, 8)
    assert aligned(x) is x
    assert aligned(x[:, :4]).data_ptr() == x.data_ptr()
    for other in (torch.randn(6, 9)[:, :8], x[:, 1:5], x.T, x[:1].expand(6, 8)):
        copy = aligned(other)
        assert torch.equal(copy, other)
        assert copy.is_contiguous()
        assert copy.data_ptr() != other.data_ptr()


def test_mismatched_operands_are_refused():
    x, w, ends, _ = routed([3, 2])
    with pytest.raises(ValueError, match="one D, got 7 and 8"):
        grouped_mm(x[:, :7], w, ends)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float64 and torch\.float32"):
        grouped_mm(x.double(), w, ends)


def test_autocast_makes_it_bfloat16_and_gradients_float32():
    x, w, ends, owner = routed([3, 2])
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_mm(x, w, ends)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, w[owner].bfloat16().sum(-1).float(), rtol=2e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("stored_out_first", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_cuda_bfloat16_matches_float64_without_waiting(stored_out_first, rows):
    x, w, ends, owner = routed(
        rows, 64, 48, stored_out_first=stored_out_first, device="cuda", dtype=torch.bfloat16
    )
    x.requires_grad_()
    w.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grouped_mm(x, w, ends, impl="torch")
        dx, dw = torch.autograd.grad(out, (x, w), torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    want = row_by_row(owner)(x64, w64, ends)
    expected = want, *torch.autograd.grad(want.sum(), (x64, w64))
    for a, b in zip((out, dx, dw), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
