"""Sorting by expert, and the gathers to expert order and back."""

import pytest
import torch

from fathom.ops.permute import combine, gather, gather_sum, sort_by_expert, without_last

CASES = {  # N, K, E
    "none": (0, 2, 4),
    "one": (1, 1, 1),
    "top-one": (17, 1, 4),
    "some": (17, 2, 4),
    "many-experts": (33, 6, 300),
}


def routing(case, device="cpu"):
    tokens, top_k, experts = case
    scores = torch.rand(tokens, experts, device=device)
    return scores.topk(top_k, dim=-1).indices, experts


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_sorted_by_expert_then_by_token(case, device):
    ids, experts = routing(case, device)
    found = sort_by_expert(ids, experts)
    flat = ids.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert found.order.tolist() == order
    assert found.inverse.tolist() == [order.index(pair) for pair in range(len(flat))]
    assert found.counts.tolist() == [flat.count(e) for e in range(experts)]
    assert found.ends.tolist() == [sum(e <= last for e in flat) for last in range(experts)]
    assert [t.dtype for t in found] == [torch.int64, torch.int64, torch.int32, torch.int64]


def test_one_expert_may_get_every_token_and_others_none():
    found = sort_by_expert(torch.full((5, 1), 2), 4)
    assert found.order.tolist() == [0, 1, 2, 3, 4]
    assert found.ends.tolist() == [0, 0, 5, 5]
    assert found.counts.tolist() == [0, 0, 5, 0]


@pytest.mark.parametrize("experts", [256, 257, 32767])
def test_the_last_expert_is_counted_where_the_narrow_integers_end(experts):
    ids = torch.tensor([[experts - 1, 0], [experts - 1, 1]])
    found = sort_by_expert(ids, experts)
    assert found.order.tolist() == [1, 3, 0, 2]
    assert found.counts.nonzero().flatten().tolist() == [0, 1, experts - 1]
    assert found.ends[-1] == 4


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gather_copies_each_tokens_row_and_its_gradient_sums_them(case, agree, device):
    ids, experts = routing(case, device)
    permutation = sort_by_expert(ids, experts)

    def by_definition(x):
        return x.repeat_interleave(case[1], dim=0)[permutation.order]

    x = torch.randn(case[0], 5, device=device)
    agree(lambda x: gather(x, permutation, case[1]), by_definition, (x,))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_combine_is_the_gated_sum_of_a_tokens_rows(case, agree, device):
    ids, experts = routing(case, device)
    permutation = sort_by_expert(ids, experts)

    def by_definition(y, gates):
        back = torch.zeros_like(y).index_copy(0, permutation.order, y)
        return (back.unflatten(0, gates.shape) * gates[..., None]).sum(1)

    inputs = torch.randn(ids.numel(), 5, device=device), torch.rand(ids.shape, device=device)
    agree(lambda *a: combine(*a, permutation), by_definition, inputs)


def absent_pairs(device):
    """Choices of 3 experts; those of a fourth have no row."""
    ids = torch.randint(0, 4, (17, 2), device=device)
    ids[0], ids[1, 0], ids[1, 1] = 3, 3, 0
    there = ids.flatten() < 3
    return ids, there, without_last(sort_by_expert(ids, 4), int(there.sum()))


def test_absent_pairs_have_no_row_and_add_nothing(agree, device):
    ids, there, found = absent_pairs(device)
    assert len(found.order) == there.sum()
    assert torch.equal(ids.flatten()[found.order], ids.flatten()[there].sort(stable=True).values)
    assert found.counts.tolist() == [(ids == expert).sum() for expert in range(3)]

    def rows_of(x):
        return x.repeat_interleave(2, dim=0)[found.order]

    def sums_of(y, gates):
        back = torch.zeros_like(y[:1]).repeat(34, 1).index_copy(0, found.order, y)
        return (back.unflatten(0, (17, 2)) * gates[..., None]).sum(1)

    agree(lambda x: gather(x, found, 2), rows_of, (torch.randn(17, 5, device=device),))
    inputs = torch.randn(len(found.order), 5, device=device), torch.rand(17, 2, device=device)
    agree(lambda *a: combine(*a, found), sums_of, inputs)


def test_gradients_agree_with_finite_differences():
    ids, experts = routing(CASES["some"])
    permutation = sort_by_expert(ids, experts)
    x = torch.randn(17, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(17, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, gates):
        return combine(gather(x, permutation, 2), gates, permutation)

    assert torch.autograd.gradcheck(there_and_back, (x, gates))


def test_equal_gates_that_sum_to_one_bring_every_token_back():
    ids, experts = routing(CASES["some"])
    permutation = sort_by_expert(ids, experts)
    x = torch.randn(17, 8)
    back = combine(gather(x, permutation, 2), torch.full((17, 2), 0.5), permutation)
    assert torch.equal(back, x)


def test_bfloat16_rows_are_summed_in_float32_and_rounded_once(device):
    ids, experts = routing((33, 6, 8), device)
    permutation = sort_by_expert(ids, experts)
    y = torch.randn(ids.numel(), 16, device=device).bfloat16()
    gates = torch.rand(ids.shape, device=device)
    got = combine(y, gates, permutation)
    assert torch.equal(got, combine(y.float(), gates, permutation).bfloat16())


def test_gates_keep_their_dtype_in_the_gradient():
    ids, experts = routing(CASES["some"])
    permutation = sort_by_expert(ids, experts)
    y = torch.randn(34, 4).bfloat16().requires_grad_()
    gates = torch.rand(17, 2, requires_grad=True)
    combine(y, gates, permutation).sum().backward()
    assert (y.grad.dtype, gates.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("gated", [False, True])
def test_the_two_ways_of_a_gather_sum_agree(gated):
    y, rows = torch.randn(12, 5), torch.randint(0, 12, (7, 3))
    gates = torch.rand(7, 3) if gated else None
    narrow = gather_sum(y.bfloat16(), rows, gates)
    wide = gather_sum(y.bfloat16().float(), rows, gates)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.gpu
def test_nothing_waits_for_the_device_and_two_runs_are_equal_bit_for_bit():
    ids, experts = routing((257, 6, 64), "cuda")
    x = torch.randn(257, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gates = torch.rand(257, 6, device="cuda", requires_grad=True)

    def run():
        permutation = sort_by_expert(ids, experts)
        out = combine(gather(x, permutation, 6), gates, permutation)
        return [out, *torch.autograd.grad(out.square().sum(), (x, gates))]

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
