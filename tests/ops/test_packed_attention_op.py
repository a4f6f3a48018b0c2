"""Attention within packed documents: against one call a document, and its windows."""

import pytest
import torch

from fathom.ops import attention, packed_attention
from fathom.ops.packed_attention import PACKED_ATTENTION, _packed_attention, same_document
from fathom.ops.registry import choose

SHAPES = {  # B, T, H, G, Q, V
    "heads": (2, 11, 4, 4, 8, 8),
    "grouped": (2, 11, 6, 2, 5, 3),
    "mla": (1, 13, 2, 2, 24, 16),
}
BORDERS = {
    "rows": [0, 1],
    "documents": [0, 0.3, 0.4, 1],
    "one token": [0, 0.1, 1],
    "empty": [0, 0.5, 0.5, 1],
}


def borders(fractions, batch, length, device="cpu"):
    """The same documents in every row."""
    starts = [row * length + round(part * length) for row in range(batch) for part in fractions]
    return torch.tensor(sorted(starts), dtype=torch.int32, device=device)


def tensors(shape, device="cpu", dtype=torch.float32):
    batch, length, heads, groups, width, values = shape
    sizes = ((heads, width), (groups, width), (groups, values))
    return tuple(torch.randn(batch, length, *s, device=device, dtype=dtype) for s in sizes)


def one_by_one(cu_seqlens, window=None):
    """Every document through plain attention, which has its own float64 tests."""

    def run(q, k, v):
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        parts = []
        for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
            places = torch.arange(stop - start, device=q.device)
            near = (places[:, None] >= places) & (places[:, None] - places < (window or stop))
            document = (t[None, start:stop] for t in flat)
            parts.append(attention(*document, scale=0.4, mask=near, impl="reference")[0])
        return torch.cat(parts).view(*q.shape[:3], -1)

    return run


@pytest.mark.parametrize("fractions", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_document_reads_nothing_but_itself(shape, fractions, agree, device):
    cu_seqlens = borders(fractions, *shape[:2], device)
    agree(
        lambda *t: packed_attention(*t, cu_seqlens, scale=0.4),
        one_by_one(cu_seqlens),
        tensors(shape, device),
    )


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_ends_at_the_border(window, agree):
    cu_seqlens = borders([0, 0.3, 1], 2, 11)
    agree(
        lambda *t: packed_attention(*t, cu_seqlens, scale=0.4, window_size=window),
        one_by_one(cu_seqlens, window),
        tensors(SHAPES["heads"]),
    )


def test_what_a_token_sees_is_its_document_up_to_itself():
    (seen,) = same_document(torch.tensor([0, 2, 5], dtype=torch.int32), 1, 5)
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_heads_that_do_not_divide_are_refused():
    q, k, v = tensors((1, 3, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 key heads"):
        packed_attention(q, k, v, borders([0, 1], 1, 3), scale=1.0)


def test_the_kernel_says_what_it_needs():
    with pytest.raises(ValueError, match="it needs CUDA tensors, got cpu"):
        packed_attention(*tensors(SHAPES["heads"]), borders([0, 1], 2, 11), scale=1.0, impl="torch")
    assert "bfloat16 or float16" in PACKED_ATTENTION.why_not("torch", "cuda", torch.float32)
    assert PACKED_ATTENTION.why_not("torch", "cuda", torch.bfloat16) == ""


CUDA_SHAPES = {  # with documents whose borders are no multiple of a tile
    "mla": (1, 1000, 4, 4, 192, 128),
    "grouped": (2, 300, 6, 2, 64, 64),
    "shared key": (2, 300, 4, 1, 96, 64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shape", CUDA_SHAPES.values(), ids=CUDA_SHAPES)
def test_on_a_gpu_it_is_as_exact_as_pytorch_in_the_same_dtype(shape, window):
    cu_seqlens = borders([0, 0.123, 0.123, 0.5, 0.504, 1], *shape[:2], "cuda")
    inputs = tensors(shape, "cuda", torch.bfloat16)
    assert choose(PACKED_ATTENTION, "auto", *inputs) == "torch"

    def results(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = packed_attention(*leaves, cu_seqlens, scale=0.1, window_size=window, impl=impl)
        dout = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=dtype).view(out.shape)
        return [
            out.detach().double(),
            *(g.double() for g in torch.autograd.grad(out, leaves, dout)),
        ]

    exact = results("reference", torch.float64)
    found = results("torch", torch.bfloat16)
    plain = results("reference", torch.bfloat16)
    for name, a, b, want in zip(["out", "dq", "dk", "dv"], found, plain, exact, strict=True):
        wrong, usual = ((t - want).norm() / want.norm() for t in (a, b))
        assert wrong <= max(2 * usual, 4e-3), name


@pytest.mark.gpu
def test_on_a_gpu_the_op_is_what_it_says_to_the_compiler():
    q, k, v = (t.requires_grad_() for t in tensors((2, 64, 4, 2, 64, 64), "cuda", torch.bfloat16))
    args = (q, k, v, borders([0, 0.3, 1], 2, 64, "cuda"), 0.1, 0)
    torch.library.opcheck(_packed_attention, args)
