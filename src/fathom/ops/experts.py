"""The routed experts as one op: to expert order, two grouped products with a SwiGLU between, back.

Forward and backward are written once, as passes over memory; ``triton`` does each pass between the
products in one kernel, ``torch`` in PyTorch's. Only the tokens, the pre-activation and the routing
are kept for the backward: gathered rows are gathered again, the activation comes out of the same
pass as its gradient (after SonicMoE, arXiv:2512.14080). No atomics, and no word from the device.

Shapes: N tokens, K experts per token, P = N * K rows sorted by expert, D model dim, E experts,
I one expert's inner dim.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from fathom.ops import permute as torch_permute
from fathom.ops import swiglu as torch_swiglu
from fathom.ops.grouped_mm import (
    grouped_mm,
    grouped_mm_reference,
    grouped_outer_reference,
    torch_outer,
    torch_product,
    torch_refusal,
)
from fathom.ops.permute import Permutation, combine, gather, sort_by_expert, without_last
from fathom.ops.proof import PROVEN, random, settle
from fathom.ops.registry import (
    Impl,
    Implementations,
    autocast,
    choose,
    needs_triton,
    op,
    takes_all,
)


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernels need: CUDA, and products that ``F.grouped_mm`` takes."""
    return needs_triton(device, dtype) or refusal(device, dtype, *tensors)


def refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What ``F.grouped_mm`` needs of both weights."""
    reasons = [torch_refusal(device, dtype, tensors[0], w) for w in tensors[1:3]]
    return next(filter(None, reasons or [torch_refusal(device, dtype)]), "")


EXPERTS = Implementations(
    op="experts",
    refusals={"triton": triton_refusal, "torch": refusal, "reference": takes_all},
)


def experts(
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    permutation: Permutation,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``y[n] = sum_k gates[n, k] * W_down(silu(W_gate x[n]) * W_up x[n])`` of its k-th expert.

    Args:
        x_ND: the tokens.
        w_gate_up_EGD: ``[E, 2I, D]``, gate rows first.
        w_down_EDI: ``[E, D, I]``.
        gates_NK: weights of the choices, float32 (float64 for float64).
        permutation: of the choices, by :func:`sort_by_expert`; a choice without a row adds nothing.
        impl: which implementation.

    Returns:
        ``[N, D]`` in x's dtype. Products accumulate in float32 (float64 for float64), as do the
        passes between them.
    """
    x_ND, w_gate_up_EGD, w_down_EDI = autocast(x_ND, w_gate_up_EGD, w_down_EDI)
    chosen = choose(EXPERTS, impl, x_ND, w_gate_up_EGD, w_down_EDI)
    if (impl, chosen) == ("auto", "triton"):
        chosen = PROVEN
    if chosen == "reference":
        return experts_reference(x_ND, w_gate_up_EGD, w_down_EDI, gates_NK, permutation)
    order_P, inverse_P, ends_E, _ = permutation
    return _experts(x_ND, w_gate_up_EGD, w_down_EDI, gates_NK, order_P, inverse_P, ends_E, chosen)[
        0
    ]


def experts_reference(
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    permutation: Permutation,
) -> Tensor:
    """The definition, of differentiable parts: on any device and dtype."""
    rows_PD = gather(x_ND, permutation, gates_NK.shape[1])
    h_P2I = grouped_mm(rows_PD, w_gate_up_EGD.mT, permutation.ends, impl="reference")
    gate_PI, up_PI = h_P2I.chunk(2, dim=-1)
    y_PD = grouped_mm(silu(gate_PI) * up_PI, w_down_EDI.mT, permutation.ends, impl="reference")
    return combine(y_PD, gates_NK, permutation)


class Passes(NamedTuple):
    """What the layer is made of: two modules of passes, and two grouped products."""

    rows: ModuleType  # gather_rows, gather_sum
    inner: ModuleType  # swiglu, swiglu_backward
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = torch_product
    outer: Callable[[Tensor, Tensor, Tensor], Tensor] = torch_outer


def _passes(impl: str, device: torch.device) -> Passes:
    if settle(impl, _check, device) == "torch":
        return Passes(torch_permute, torch_swiglu)
    from fathom.ops.triton import permute, swiglu

    return Passes(permute, swiglu)


def row_passes(x: Tensor) -> ModuleType:
    """``gather_rows`` and ``gather_sum`` for x: kernels if they can and prove right, or PyTorch."""
    kernels = not triton_refusal(x.device.type, x.dtype)
    return _passes(PROVEN if kernels else "torch", x.device).rows


def _flops(products: int) -> Any:
    """Of the experts' forward (1) or backward (2), which gets one argument more, first."""

    def count(*shapes: Sequence[int]) -> int:
        w_down, order = shapes[products + 1], shapes[products + 3]
        return products * 6 * order[0] * w_down[1] * w_down[2]

    return count


def _fake(
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    order_P: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(len(order_P), w_gate_up_EGD.shape[1])


def _fake_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (x_ND, w_gate_up_EGD, w_down_EDI, gates_NK)
    dx, dgate_up, ddown, dgates = (t.new_empty(t.shape) for t in wanted)
    return dx, dgate_up, ddown, dgates


def backward(
    passes: Passes,
    grad_ND: Tensor,
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    order_P: Tensor,
    inverse_P: Tensor,
    ends_E: Tensor,
    h_P2I: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tokens, both weights and the gates."""
    rows, inner, product, outer = passes
    top_k = gates_NK.shape[1]
    dy_PD = rows.gather_rows(grad_ND, order_P, inverse_P, top_k)
    da_PI = product(dy_PD, w_down_EDI, ends_E)
    dh_P2I, dgates_P, a_PI = inner.swiglu_backward(h_P2I, gates_NK.flatten(), order_P, da_PI)
    del da_PI
    dw_down_EDI = outer(dy_PD, a_PI, ends_E)
    del dy_PD, a_PI
    x_PD = rows.gather_rows(x_ND, order_P, inverse_P, top_k)
    dw_gate_up_EGD = outer(dh_P2I, x_PD, ends_E)
    del x_PD
    dx_PD = product(dh_P2I, w_gate_up_EGD, ends_E)
    del dh_P2I
    dx_ND = rows.gather_sum(dx_PD, inverse_P.view(gates_NK.shape))
    return dx_ND, dw_gate_up_EGD, dw_down_EDI, dgates_P.view(gates_NK.shape)


@op("experts_backward", fake=_fake_backward, flops=_flops(2))
def _experts_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    order_P: Tensor,
    inverse_P: Tensor,
    ends_E: Tensor,
    h_P2I: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = (w_gate_up_EGD, w_down_EDI, gates_NK)
    routing = (order_P, inverse_P, ends_E)
    return backward(_passes(impl, x_ND.device), grad_ND, x_ND, *weights, *routing, h_P2I)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_ND: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    arguments: tuple[Any, ...] = (grad_ND, *ctx.saved_tensors, ctx.impl)
    return *_experts_backward(*arguments), None, None, None, None


def forward(
    passes: Passes,
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    order_P: Tensor,
    inverse_P: Tensor,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor]:
    """The layer's result, and the pre-activation for its backward."""
    rows, inner, product, _ = passes
    x_PD = rows.gather_rows(x_ND, order_P, inverse_P, gates_NK.shape[1])
    h_P2I = product(x_PD, w_gate_up_EGD.mT, ends_E)
    del x_PD
    a_PI = inner.swiglu(h_P2I, gates_NK.flatten(), order_P)
    y_PD = product(a_PI, w_down_EDI.mT, ends_E)
    del a_PI
    return rows.gather_sum(y_PD, inverse_P.view(gates_NK.shape)), h_P2I


@op("experts", fake=_fake, flops=_flops(1), setup=_setup, backward=_backward)
def _experts(
    x_ND: Tensor,
    w_gate_up_EGD: Tensor,
    w_down_EDI: Tensor,
    gates_NK: Tensor,
    order_P: Tensor,
    inverse_P: Tensor,
    ends_E: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    weights = (w_gate_up_EGD, w_down_EDI, gates_NK)
    return forward(_passes(impl, x_ND.device), x_ND, *weights, order_P, inverse_P, ends_E)


def _check(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The kernels' results on ``device``, and the definition's in float64."""
    from fathom.ops.triton import permute, swiglu

    x, grad = random(200, 64, device=device), random(200, 64, device=device).flip(0)
    weights = random(8, 96, 64, device=device), random(8, 64, 48, device=device)
    scores = random(200, 8, device=device, dtype=torch.float32)
    gates, ids = scores.sigmoid().topk(3)
    ids[:50] = 5  # a ragged load; a token may come to an expert thrice
    ids[60:90, 1] = 8  # and some choices have no row
    routing = sort_by_expert(ids, 9, impl="torch")
    routing = without_last(routing, ids.numel() - 30)[:3]
    exact = Passes(torch_permute, torch_swiglu, grouped_mm_reference, grouped_outer_reference)
    found = []
    for passes, dtype in ((Passes(permute, swiglu), None), (exact, torch.float64)):
        inputs = (t.to(dtype or t.dtype) for t in (grad, x, *weights, gates))
        dy, *layer = (*inputs, *routing)
        y, h = forward(passes, *layer)
        arguments: list[Any] = [dy, *layer, h]
        found.append([y, *backward(passes, *arguments)])
    yield from zip(*found, strict=True)
