"""The fused product and SwiGLU gradient: what the two give one after the other."""

import pytest
import torch

from fathom.ops.grouped_mm import grouped_mm_reference
from fathom.ops.swiglu import swiglu_backward
from fathom.ops.triton.experts import down_backward

SMALL = (16, 16, 16)  # blocks, so that little work has many tiles


@pytest.mark.parametrize(
    ("counts", "dim", "inner"),
    [([1], 4, 4), ([0, 17, 0, 16, 5], 24, 40), ([200, 0, 3], 16, 16), ([0, 0], 8, 8)],
    ids=["one", "ragged", "more-than-a-group", "none"],
)
def test_it_is_the_product_and_then_the_gradient(counts, dim, inner, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows, experts = sum(counts), len(counts)
    shapes = (rows, dim), (experts, dim, inner), (rows, 2 * inner)
    dy, w, h = (torch.randn(s, device=device).to(dtype) for s in shapes)
    gates, order = torch.rand(rows, device=device), torch.randperm(rows, device=device)
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    got = down_backward(dy, w, ends, h, gates, order, blocks=SMALL, num_warps=4)
    product = grouped_mm_reference(dy.double(), w.double(), ends)
    want = swiglu_backward(h.double(), gates.double(), order, product)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
