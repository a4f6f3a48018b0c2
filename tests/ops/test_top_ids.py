"""The largest values' ids: which of equals comes first, and that the compiler may meet the op."""

import pytest
import torch
from torch.library import opcheck

from fathom.ops.top_ids import top_ids


def test_a_tie_among_the_chosen_and_at_the_border_goes_to_the_lowest_index(device):
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_ids(values.to(device), 4).tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize(("n_experts", "k"), [(1, 1), (7, 7), (64, 6), (160, 6), (257, 8)])
def test_top_ids_are_those_of_a_stable_sort(n_experts, k, device):
    values = torch.randn(33, n_experts).mul(4).round()  # many ties
    want = values.argsort(dim=-1, descending=True, stable=True)[:, :k]
    given = values.to(device, copy=True)
    assert torch.equal(top_ids(given, k).cpu(), want)
    assert torch.equal(given.cpu(), values)


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_the_op_passes_opcheck(rows, device):
    opcheck(torch.ops.fathom.top_ids.default, (torch.randn(rows, 7, device=device), 3))
