"""Kernels of the expert layer, interpreted, at whatever sizes hypothesis thinks of."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.ops import permute
from fathom.ops.experts import _experts
from fathom.ops.triton import permute as kernels

EXAMPLES = settings(max_examples=10, deadline=None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@EXAMPLES
@given(st.lists(st.integers(0, 4), max_size=40))
def test_any_list_is_sorted_as_a_stable_sort_does(ids):
    given_ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    got, want = kernels.sort_by_expert(given_ids, 5), permute._radix_sort(given_ids, 5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@EXAMPLES
@given(
    tokens=st.integers(0, 6),
    top_k=st.integers(1, 4),
    spare=st.integers(0, 3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_any_layer_gives_what_pytorchs_passes_give(tokens, top_k, spare, widths, seed):
    torch.manual_seed(seed)
    dtype, unit = (torch.bfloat16, 8) if DEVICE == "cuda" else (torch.float32, 4)
    experts, (dim, inner) = top_k + spare, (unit * n for n in widths)
    shapes = ((tokens, dim), (experts, 2 * inner, dim), (experts, dim, inner))
    tensors = [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]
    tensors.append(torch.rand(tokens, top_k, device=DEVICE).requires_grad_())
    ids = torch.rand(tokens, experts, device=DEVICE).topk(top_k, dim=-1).indices
    routing = permute.sort_by_expert(ids, experts)[:3]
    found = []
    for impl in ("triton", "torch"):
        out = _experts(*tensors, *routing, impl)[0]
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6
