"""A linear layer in parts is the linear layer, whatever the layout, the rows and the threads."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fathom.ops import linear as module
from fathom.ops.linear import FEW_ROWS, by_columns, by_rows, few_rows_on_a_cpu, linear


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (), (FEW_ROWS + 1,)])
@pytest.mark.parametrize(("width", "outputs"), [(6, 10), (7, 10), (6, 9), (5, 7), (1, 2)])
@torch.no_grad()
def test_it_is_the_product_in_float64(rows, width, outputs, columns_first):
    x, bias = torch.randn(*rows, width), torch.randn(outputs)
    weight = torch.randn(width, outputs).t() if columns_first else torch.randn(outputs, width)
    want = functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), want, rtol=1e-5, atol=1e-5)
    want = functional.linear(x.double(), weight.double())
    torch.testing.assert_close(linear(x, weight).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_parts", [1, 2, 3, 6])
def test_any_number_of_parts_gives_the_same(n_parts):
    x, weight = torch.randn(4, 6).double(), torch.randn(12, 6).double()
    for by_part in (by_rows, by_columns):
        torch.testing.assert_close(by_part(x, weight, n_parts), x @ weight.T)


@torch.no_grad()
def test_parts_are_used_for_few_float32_rows_without_a_gradient():
    x, weight = torch.randn(1, 1, 8), torch.randn(4, 8)
    assert few_rows_on_a_cpu(x, weight) == torch.backends.mkl.is_available()
    assert not few_rows_on_a_cpu(torch.randn(FEW_ROWS + 1, 8), weight)
    assert not few_rows_on_a_cpu(x[:0], weight)
    assert not few_rows_on_a_cpu(x.double(), weight.double())
    assert not few_rows_on_a_cpu(x.to("meta"), weight.to("meta"))
    with torch.enable_grad():
        assert not few_rows_on_a_cpu(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_a_gradient_reaches_everything():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 8), (4, 8), (4,)))
    linear(x, weight, bias).sum().backward()
    assert all(t.grad is not None for t in (x, weight, bias))


@torch.no_grad()
def test_flops_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(module, "few_rows_on_a_cpu", lambda *_: True)
    for weight in (torch.randn(4, 8), torch.randn(8, 4).t()):
        with FlopCounterMode(display=False) as counter:
            linear(torch.randn(3, 8), weight)
        assert counter.get_total_flops() == 2 * 3 * 4 * 8
