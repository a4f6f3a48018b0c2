"""The expert layer as one op: every implementation against each token's own products in float64."""

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from fathom.ops.experts import _experts, experts
from fathom.ops.permute import sort_by_expert, without_last
from fathom.ops.registry import HAS_TRITON

CASES = {  # N, K, E, D, I
    "one": (1, 1, 1, 4, 4),
    "some": (17, 3, 5, 8, 12),
    "mostly-empty": (4, 2, 40, 8, 4),
    "wide-choice": (9, 6, 6, 4, 8),
}
WITHOUT_GPU = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="kernels are interpreted without CUDA"
)
PATHS = ["reference", "torch", pytest.param("triton", marks=WITHOUT_GPU)]


def layer(case, device="cpu", dtype=torch.float32, *, ids=None):
    """x, both weights, gates, and each token's experts."""
    tokens, top_k, n_experts, dim, inner = case
    if ids is None:
        ids = torch.rand(tokens, n_experts, device=device).topk(top_k, dim=-1).indices
    shapes = ((tokens, dim), (n_experts, 2 * inner, dim), (n_experts, dim, inner))
    tensors = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
    return (*tensors, torch.rand(tokens, top_k, device=device)), ids


def token_by_token(ids):
    def run(x, w_gate_up, w_down, gates):
        h = torch.einsum("nd,nkgd->nkg", x, w_gate_up[ids])
        gate, up = h.chunk(2, dim=-1)
        y = torch.einsum("nki,nkdi->nkd", silu(gate) * up, w_down[ids])
        return (y * gates[..., None]).sum(1)

    return run


def path(impl, ids, n_experts):
    """The op; the kernels' passes without the check that they need a GPU."""
    permutation = sort_by_expert(ids, n_experts)
    if impl == "triton":
        return lambda *tensors: _experts(*tensors, *permutation[:3], impl)[0]
    return lambda *tensors: experts(*tensors, permutation, impl=impl)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_every_tokens_own_products(impl, case, agree):
    tensors, ids = layer(case)
    agree(path(impl, ids, case[2]), token_by_token(ids), tensors)


@pytest.mark.parametrize("impl", PATHS)
def test_one_expert_may_get_every_token(impl, agree):
    ids = torch.full((6, 1), 2)
    tensors, _ = layer((6, 1, 4, 8, 8), ids=ids)
    agree(path(impl, ids, 4), token_by_token(ids), tensors)


@pytest.mark.parametrize("impl", PATHS)
def test_a_choice_without_a_row_adds_nothing(impl, agree):
    tensors, ids = layer(CASES["some"])
    absent = torch.rand(ids.shape) < 0.4
    n_rows = ids.numel() - int(absent.sum())
    found = without_last(sort_by_expert(ids.masked_fill(absent, 5), 6), n_rows)

    def run(*tensors):
        if impl == "triton":
            return _experts(*tensors, *found[:3], impl)[0]
        return experts(*tensors, found, impl=impl)

    every = token_by_token(ids)
    agree(run, lambda *t: every(*t[:3], t[3].masked_fill(absent, 0.0)), tensors)


@pytest.mark.parametrize("impl", PATHS)
def test_no_tokens_give_no_rows_and_zero_weight_gradients(impl):
    tensors, ids = layer((0, 2, 3, 4, 4))
    leaves = [t.requires_grad_() for t in tensors]
    out = path(impl, ids, 3)(*leaves)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (0, 4)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=WITHOUT_GPU)])
def test_views_with_strides_of_their_own_are_taken(impl, agree):
    (x, *weights, gates), ids = layer(CASES["some"])
    run = path(impl, ids, 5)
    for odd in (x.T.contiguous().T, torch.cat([x, x], dim=1)[:, 3:11]):
        agree(lambda *t: run(t[0], *t[1:]), token_by_token(ids), (odd, *weights, gates))
    strided = torch.cat([gates, gates], dim=1)[:, ::2]
    agree(run, token_by_token(ids), (x, *weights, strided))
    expanded = torch.zeros(17, 8).requires_grad_()  # the gradient of a sum has strides of 0
    run(expanded, *weights, gates).sum().backward()
    want = token_by_token(ids)(zero := torch.zeros(17, 8).requires_grad_(), *weights, gates)
    torch.testing.assert_close(expanded.grad, torch.autograd.grad(want.sum(), zero)[0])


def test_odd_widths_run_by_the_reference_and_are_refused_by_torch(agree):
    tensors, ids = layer((5, 2, 3, 7, 3))
    agree(path("auto", ids, 3), token_by_token(ids), tensors)
    with pytest.raises(ValueError, match="rows of whole 16-byte units"):
        path("torch", ids, 3)(*tensors)


def test_bf16_is_no_less_exact_than_the_parts_on_their_own(device):
    case = (65, 4, 8, 64, 32)
    (x, *weights, gates), ids = layer(case, device)
    narrow = [t.bfloat16() for t in (x, *weights)]
    exact = token_by_token(ids)(*(t.double() for t in narrow), gates.double())
    permutation = sort_by_expert(ids, 8)
    plain = experts(*narrow, gates, permutation, impl="reference")
    got = experts(*narrow, gates, permutation)
    assert (got - exact).norm() <= 2 * (plain - exact).norm()


def test_only_tokens_pre_activations_and_routing_are_kept():
    case = (17, 3, 5, 8, 12)
    tensors, ids = layer(case)
    kept = []
    run = path("torch", ids, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(*(t.requires_grad_() for t in tensors))
    rows = [t for t in kept if t.shape[0] == 17 * 3 and t.is_floating_point()]
    assert [tuple(t.shape) for t in rows] == [(51, 24)]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_flops_are_those_of_the_products(impl):
    tensors, ids = layer(CASES["some"])
    leaves = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as forward:
        out = path(impl, ids, 5)(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    one = 6 * 17 * 3 * 8 * 12
    assert (forward.get_total_flops(), backward.get_total_flops()) == (one, 2 * one)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=WITHOUT_GPU)])
def test_the_ops_pass_opcheck(impl):
    tensors, ids = layer(CASES["some"])
    routing = sort_by_expert(ids, 5)[:3]
    leaves = [t.requires_grad_() for t in tensors]
    opcheck(torch.ops.fathom.experts.default, (*leaves, *routing, impl))
    x, *rest = (t.detach() for t in leaves)
    h = _experts(x, *rest, *routing, impl)[1]
    inputs = (torch.randn_like(x), x, *rest, *routing, h, impl)
    opcheck(torch.ops.fathom.experts_backward.default, inputs)


def test_a_graph_of_one_op_compiles():
    tensors, ids = layer(CASES["some"])

    def run(x, w_gate_up, w_down, gates):
        return experts(x, w_gate_up, w_down, gates, sort_by_expert(ids, 5)).square().sum()

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(513, 6, 64, 256, 128), (128, 8, 128, 64, 64), (1, 4, 8, 64, 32)])
def test_cuda_is_as_exact_as_plain_pytorch_waits_for_nothing_and_repeats_itself(case):
    (x, *weights, gates), ids = layer(case, "cuda")
    leaves = [t.bfloat16().requires_grad_() for t in (x, *weights)] + [gates.requires_grad_()]
    grad = torch.randn_like(leaves[0])

    def run(function, tensors):
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    def ours(*tensors):
        permutation = sort_by_expert(ids, case[2])
        return experts(*tensors, permutation, impl="triton")

    first = run(ours, leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(ours, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    permutation = sort_by_expert(ids, case[2])
    plain = run(lambda *t: experts(*t, permutation, impl="reference"), leaves)
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    exact = run(lambda *t: experts(*t, permutation, impl="reference"), doubled)
    for a, b, c in zip(first, plain, exact, strict=True):
        error, plain_error = ((t.double() - c).norm() for t in (a, b))
        assert error <= 2 * plain_error + 1e-6 * c.norm()
