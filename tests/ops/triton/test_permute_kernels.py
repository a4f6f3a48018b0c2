"""The counting sort and the gathers say what PyTorch's sort and indexing say, at odd sizes too."""

import pytest
import torch

from fathom.ops import permute
from fathom.ops.triton import permute as kernels
from fathom.ops.triton.permute import SORT_BLOCK

SIZES = [(0, 3), (1, 1), (SORT_BLOCK, 4), (SORT_BLOCK + 1, 300), (3 * SORT_BLOCK - 1, 33)]


def equal_to_a_radix_sort(ids, experts):
    order, inverse, ends, counts = kernels.sort_by_expert(ids, experts)
    want = permute._radix_sort(ids, experts)
    for a, b in zip((order, inverse, ends, counts), want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(("pairs", "experts"), SIZES)
def test_the_counting_sort_is_the_radix_sort(pairs, experts, device):
    equal_to_a_radix_sort(torch.randint(0, experts, (pairs,), device=device), experts)


def test_ids_with_a_stride_of_their_own_are_sorted(device):
    equal_to_a_radix_sort(torch.randint(0, 5, (90, 2), device=device)[:, 1], 5)


@pytest.mark.parametrize("expert", [0, 6])
def test_one_expert_may_have_every_pair(expert, device):
    ids = torch.full((SORT_BLOCK + 5,), expert, device=device)
    equal_to_a_radix_sort(ids, 7)


def routed(tokens, top_k, width, device):
    ids = torch.rand(tokens, 9, device=device).topk(top_k, dim=-1).indices
    permutation = permute._radix_sort(ids.flatten(), 9)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return permutation, torch.randn(tokens, width, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(1, 1, 1), (5, 3, 8), (17, 2, 1030), (0, 2, 8)]
)
def test_rows_go_to_expert_order_and_are_added_back(tokens, top_k, width, device):
    (order, inverse, *_), x = routed(tokens, top_k, width, device)
    rows = kernels.gather_rows(x, order, inverse, top_k)
    assert torch.equal(rows, permute.gather_rows(x, order, inverse, top_k))
    back = kernels.gather_sum(rows, inverse.view(-1, top_k))
    torch.testing.assert_close(back, permute.gather_sum(rows, inverse.view(-1, top_k)))


def test_tokens_with_strides_of_their_own_are_gathered(device):
    (order, inverse, *_), x = routed(6, 2, 8, device)
    for odd in (x.T.contiguous().T, x[:1].expand(6, 8), torch.cat([x, x], dim=1)[:, 3:11]):
        rows = kernels.gather_rows(odd, order, inverse, 2)
        assert torch.equal(rows, permute.gather_rows(odd, order, inverse, 2))


def test_pairs_without_a_row_are_not_written_and_count_as_zeros(device):
    ids = torch.tensor([[0, 3], [3, 3], [1, 0], [2, 1]], device=device)
    order, inverse, *_ = permute.without_last(permute.sort_by_expert(ids, 4), 5)
    x = torch.randn(4, 8, device=device)
    rows = kernels.gather_rows(x, order, inverse, 2)
    assert torch.equal(rows, x[order // 2])
    assert torch.equal(
        kernels.gather_sum(rows, inverse.view(4, 2)), x * x.new_tensor([[1], [0], [2], [2]])
    )
