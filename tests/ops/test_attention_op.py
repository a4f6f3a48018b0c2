"""Attention: every implementation against one query at a time in float64; blind queries; FLOPs."""

import pytest
import torch
from torch.library import opcheck
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from fathom.ops.attention import attention, backends, few_queries, sdpa
from fathom.ops.cpu_attention import backward_flops, forward_flops

IMPLS = ["reference", "torch"]
SHAPES = {  # B, T, S, H, G, Q, V
    "one-token": (1, 1, 1, 1, 1, 1, 1),
    "heads": (2, 9, 9, 4, 4, 8, 8),
    "grouped": (2, 9, 9, 6, 2, 8, 8),
    "one-key-head": (1, 33, 33, 4, 1, 5, 5),
    "narrow-values": (2, 9, 9, 4, 4, 7, 3),
    "wide-values": (2, 9, 9, 4, 2, 3, 8),
    "shared-latent": (2, 9, 9, 4, 1, 12, 8),
}
CROSS = {
    "decode": (3, 1, 17, 4, 2, 8, 8),
    "decode-latent": (3, 1, 17, 4, 1, 12, 8),
    "chunk-latent": (2, 3, 7, 6, 2, 5, 4),
    "long-chunk-latent": (2, 11, 19, 4, 1, 12, 8),
}


def tensors(shape, device="cpu", dtype=torch.float32):
    batch, length, keys, heads, groups, width, values = shape
    sizes = (
        (batch, length, heads, width),
        (batch, keys, groups, width),
        (batch, keys, groups, values),
    )
    return tuple(torch.randn(size, device=device, dtype=dtype) for size in sizes)


def query_by_query(scale, mask=None, causal=False):
    """A second derivation: loops, and softmax only over the keys that are seen."""

    def run(q, k, v):
        out = q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
        share = q.shape[2] // k.shape[2]
        for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
            scores = scale * k[b, :, h // share] @ q[b, t, h]
            seen = torch.ones(k.shape[1], dtype=torch.bool, device=q.device)
            if causal:
                seen[t + 1 :] = False
            if mask is not None:
                row = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])[b, h, t]
                seen = row if row.dtype == torch.bool else row > float("-inf")
                scores = scores if row.dtype == torch.bool else scores + row
            if seen.any():
                out[b, t, h] = scores[seen].softmax(0) @ v[b, seen, h // share]
        return out

    return run


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_causal_values_and_gradients(impl, shape, agree, device):
    agree(
        lambda q, k, v: attention(q, k, v, scale=0.4, causal=True, impl=impl),
        query_by_query(0.4, causal=True),
        tensors(shape, device),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["bool", "float", "per-head", "two-dim"])
@pytest.mark.parametrize("shape", CROSS.values(), ids=CROSS)
def test_masked_values_and_gradients_with_blind_queries(impl, kind, shape, agree, device):
    batch, length, keys, heads = shape[:4]
    sizes = {"per-head": (1, heads, length, keys), "two-dim": (length, keys)}
    mask = torch.rand(sizes.get(kind, (batch, 1, length, keys)), device=device) > 0.4
    mask[..., 0] = True
    if length > 1:
        mask[..., -1, :] = False
    if kind != "two-dim":
        mask[0, 0] = False  # blind altogether
    if kind == "float":
        mask = torch.randn(mask.shape, device=device).masked_fill(~mask, float("-inf"))
    agree(
        lambda q, k, v: attention(q, k, v, scale=0.4, mask=mask, impl=impl),
        query_by_query(0.4, mask=mask),
        tensors(shape, device),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing_gives_exact_zeros(impl, device):
    q, k, v = (t.requires_grad_() for t in tensors((2, 5, 5, 4, 2, 8, 8), device))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device)
    mask[1, :, 3] = False
    out = attention(q, k, v, scale=1.0, mask=mask, impl=impl)
    out.sum().backward()
    assert not out[1, 3].any()
    assert out[0, 3].all()
    assert not q.grad[1, 3].any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_agree_with_finite_differences(impl):
    inputs = tensors((1, 4, 4, 4, 2, 3, 2), dtype=torch.float64)
    mask = torch.rand(1, 1, 4, 4) > 0.3
    mask[..., 2, :] = False

    def run(q, k, v):
        return attention(q, k, v, scale=0.7, mask=mask, impl=impl)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def test_a_learned_bias_gets_its_gradient():
    inputs = tensors((1, 4, 4, 2, 2, 3, 3), dtype=torch.float64)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(bias):
        return attention(*inputs, scale=0.7, mask=bias)

    assert torch.autograd.gradcheck(run, (bias,))
    with pytest.raises(ValueError, match="it needs a mask that wants no gradient"):
        attention(*inputs, scale=0.7, mask=bias, impl="torch")


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["no-sequences", "no-queries", "no-keys"])
def test_empty_inputs_give_empty_or_zero_outputs(empty):
    shape = [2, 3, 4, 2, 2, 5, 5]
    shape[empty] = 0
    q, k, v = tensors(shape)
    mask = torch.ones(shape[1], shape[2], dtype=torch.bool)
    out = attention(q, k, v, scale=1.0, mask=mask)
    assert torch.equal(out, torch.zeros(*q.shape[:3], 5))


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_close_to_float64(impl, device):
    inputs = tensors((2, 33, 33, 4, 2, 16, 16), device, torch.bfloat16)
    got = attention(*inputs, scale=0.25, causal=True, impl=impl)
    want = query_by_query(0.25, causal=True)(*(t.double() for t in inputs))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", CROSS.values(), ids=CROSS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_torch_path_agrees_wherever_it_would_be_chosen(shape, masked, device):
    q, k, v = tensors(shape, device)
    bias = torch.randn(1, 1, shape[1], shape[2], device=device) if masked else None
    want = query_by_query(0.3, mask=bias)(*(t.double() for t in (q, k, v)))
    for path in (few_queries(q, k, v, 0.3, bias), sdpa(q, k, v, 0.3, bias, False)):
        tol = 1e-3 if path.is_cuda else 1e-5
        torch.testing.assert_close(path.double(), want, rtol=tol, atol=tol)


def test_masked_cudnn_runs_on_whole_tiles_only():
    assert backends(256, 1024, masked=True)[0] == SDPBackend.CUDNN_ATTENTION
    assert backends(256, 1024 - 64, masked=True)[0] != SDPBackend.CUDNN_ATTENTION
    assert backends(1, 77, masked=False)[0] == SDPBackend.CUDNN_ATTENTION


def test_heads_that_do_not_divide_are_refused():
    q, k, v = tensors((1, 3, 3, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 key heads"):
        attention(q, k, v, scale=1.0)


@pytest.mark.parametrize(("keys", "masked"), [(4, False), (3, True)])
def test_causal_with_a_mask_or_other_lengths_is_refused(keys, masked):
    q, k, v = tensors((1, 3, keys, 2, 2, 4, 4))
    mask = torch.ones(3, keys, dtype=torch.bool) if masked else None
    with pytest.raises(ValueError, match="as many keys as queries and no mask"):
        attention(q, k, v, scale=1.0, mask=mask, causal=True)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_single_causal_query_is_the_newest_and_sees_every_key(impl):
    q, k, v = tensors((2, 1, 5, 4, 2, 6, 6))
    got = attention(q, k, v, scale=0.4, causal=True, impl=impl)
    torch.testing.assert_close(got, query_by_query(0.4)(q, k, v))


def test_without_a_gradient_the_cpu_kernel_runs_with_no_op_around_it():
    q, k, v = tensors((2, 3, 3, 4, 2, 6, 6))
    with torch.no_grad():
        bare = attention(q, k, v, scale=0.4, causal=True, impl="torch")
    assert torch.equal(bare, attention(q, k, v, scale=0.4, causal=True, impl="torch"))


def test_autocast_reaches_the_kernel():
    q, k, v = tensors((1, 3, 3, 2, 2, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k.bfloat16(), v, scale=1.0, causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [SHAPES["grouped"], SHAPES["narrow-values"]])
@pytest.mark.parametrize("masked", [False, True])
def test_the_cpu_op_passes_opcheck(shape, masked):
    inputs = [t.requires_grad_() for t in tensors(shape)]
    bias = torch.randn(1, 1, 9, 9) if masked else None
    opcheck(torch.ops.fathom.cpu_attention.default, (*inputs, bias, not masked, 0.4))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flops_are_counted_for_the_true_widths(shape):
    batch, length, keys, heads, _, width, values = shape
    inputs = [t.requires_grad_() for t in tensors(shape)]
    pairs = batch * length * keys * heads
    with FlopCounterMode(display=False) as forward:
        out = attention(*inputs, scale=1.0, causal=True)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * pairs * (width + values)
    assert backward.get_total_flops() == 2 * pairs * (3 * width + 2 * values)


def test_pytorchs_own_cpu_attention_is_counted_too():
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in tensors((2, 9, 9, 4, 2, 8, 8)))
    with FlopCounterMode(display=False) as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out.sum().backward()
    shapes = q.shape, k.shape, v.shape
    assert counter.get_total_flops() == forward_flops(*shapes) + backward_flops(*shapes)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("keys", "groups", "width", "values"),
    [(128, 8, 64, 64), (192, 8, 96, 64), (192, 2, 64, 64), (256, 2, 96, 64), (77, 8, 192, 128)],
)
def test_cuda_kernels_are_finite_and_close_to_float64(masked, keys, groups, width, values):
    inputs = [
        t.requires_grad_()
        for t in tensors((2, keys, keys, 8, groups, width, values), "cuda", torch.bfloat16)
    ]
    mask = torch.ones(2, 1, keys, keys, dtype=torch.bool, device="cuda").tril() if masked else None
    if mask is not None:
        mask[1, :, 5] = False
    found = []
    for impl, dtype in (("torch", torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        scale = width**-0.5
        out = attention(*leaves, scale=scale, mask=mask, causal=mask is None, impl=impl)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-2, atol=5e-2)
