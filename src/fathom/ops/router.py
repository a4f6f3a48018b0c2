"""What a token's experts are chosen by, and which: the router's product, and its best scores.

The product is as exact as in float32, whatever the dtype of its factors: the product of two
bfloat16 numbers *is* a float32 number, so on a GPU matmul units do it, with sums in float32.

Equal scores go to the lowest index, on every device, so that a run can be repeated and a
recomputed forward chooses as the first did.

Shapes: N tokens, D model dim, E experts, K chosen per token, G groups of S neighbours.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fathom.ops.proof import proves, random
from fathom.ops.registry import (
    Impl,
    Implementations,
    choose,
    needs_triton,
    no_kernel,
    op,
    takes_all,
    wide,
)
from fathom.ops.top_ids import top_ids


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernel needs: float32 scores on CUDA."""
    if reason := needs_triton(device, dtype):
        return reason
    return "" if not tensors or dtype == torch.float32 else f"it needs float32 scores, got {dtype}"


ROUTER = Implementations(op="router", refusals={"triton": triton_refusal, "reference": takes_all})


def logits_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What a product by bfloat16 units that loses nothing needs."""
    dtypes = {dtype, *(t.dtype for t in tensors)}
    if device != "cuda" or dtypes != {torch.bfloat16}:
        found = ", ".join(sorted(str(d) for d in dtypes))
        return f"it needs bfloat16 on CUDA, got {found} on {device}"
    return ""


LOGITS = Implementations(
    op="router_logits",
    refusals={"triton": no_kernel, "torch": logits_refusal, "reference": takes_all},
)


def router_logits(x_ND: Tensor, w_ED: Tensor, *, impl: Impl = "auto") -> Tensor:
    """``x w^T`` with sums in float32 (float64 for float64) and no rounding: ``[N, E]``, wide."""
    if choose(LOGITS, impl, x_ND, w_ED) == "torch":
        return _router_logits(x_ND, w_ED)
    dtype = wide(x_ND.dtype)
    return linear(x_ND.to(dtype), w_ED.to(dtype))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, Tensor]:
    return _router_logits_backward(grad_NE, *ctx.saved_tensors)


@op(
    "router_logits",
    fake=lambda x, w: x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32),
    flops=lambda x, w: 2 * x[0] * x[1] * w[0],
    setup=_setup,
    backward=_backward,
)
def _router_logits(x_ND: Tensor, w_ED: Tensor) -> Tensor:
    if proves(_check, x_ND.device):
        return logits_by_bf16(x_ND, w_ED)
    return x_ND.float() @ w_ED.float().T


@op(
    "router_logits_backward",
    fake=lambda grad, x, w: (torch.empty_like(x), torch.empty_like(w)),
    flops=lambda grad, x, w: 4 * x[0] * x[1] * w[0],
)
def _router_logits_backward(grad_NE: Tensor, x_ND: Tensor, w_ED: Tensor) -> tuple[Tensor, Tensor]:
    if proves(_check, x_ND.device):
        return gradients_by_bf16(grad_NE, x_ND, w_ED)
    dx_ND, dw_ED = grad_NE @ w_ED.float(), grad_NE.T @ x_ND.float()
    return dx_ND.to(x_ND.dtype), dw_ED.to(w_ED.dtype)


def logits_by_bf16(x_ND: Tensor, w_ED: Tensor) -> Tensor:
    """The product of bfloat16 factors as float32 sums."""
    return torch.mm(x_ND, w_ED.T, out_dtype=torch.float32)


def gradients_by_bf16(grad_NE: Tensor, x_ND: Tensor, w_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and w: the float32 gradient as two bfloat16 numbers, of 16 digits together."""
    high_NE = grad_NE.to(w_ED.dtype)
    parts_N2E = torch.cat([high_NE, (grad_NE - high_NE).to(w_ED.dtype)], dim=1)
    dx_ND = parts_N2E @ torch.cat([w_ED, w_ED])
    dw_high, dw_low = torch.mm(parts_N2E.T, x_ND, out_dtype=torch.float32).chunk(2)
    return dx_ND, (dw_high + dw_low).to(w_ED.dtype)


def _check(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What bfloat16 units give on ``device``, and the exact products."""
    x, w = random(96, 128, device=device), random(16, 128, device=device)
    grad = random(96, 16, device=device, dtype=torch.float32)
    dx, dw = gradients_by_bf16(grad, x, w)
    yield logits_by_bf16(x, w), x.double() @ w.double().T
    yield dx, grad.double() @ w.double()
    yield dw, grad.double().T @ x.double()


def best_experts(
    scores_NE: Tensor,
    top_k: int,
    *,
    n_groups: int = 1,
    n_kept: int = 1,
    top_two: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Ids ``[N, K]`` int64 of the best scores, the best first; not differentiated.

    Args:
        scores_NE: float32 or float64.
        top_k: K, at most the experts that ``n_kept`` groups hold.
        n_groups: G; divides E.
        n_kept: groups that a token may use, the best; G: all.
        top_two: a group is as good as its two best scores added up; False: as its best.
        impl: which implementation.
    """
    chosen = choose(ROUTER, impl, scores_NE)
    return _best_experts(scores_NE.detach(), top_k, n_groups, n_kept, top_two, chosen)


@op(
    "best_experts",
    fake=lambda x, top_k, *_: x.new_empty(x.shape[0], top_k, dtype=torch.int64),
    flops=lambda *_: 0,
)
def _best_experts(
    scores_NE: Tensor, top_k: int, n_groups: int, n_kept: int, top_two: bool, impl: str
) -> Tensor:
    if impl == "triton":
        from fathom.ops.triton.router import best_experts as kernel

        return kernel(scores_NE, top_k, n_groups, n_kept, top_two=top_two)
    return best_experts_reference(scores_NE, top_k, n_groups, n_kept, top_two=top_two)


def best_experts_reference(
    scores_NE: Tensor, top_k: int, n_groups: int, n_kept: int, *, top_two: bool
) -> Tensor:
    """The definition: ``-inf`` for all experts outside the kept groups, then the best.

    DeepSeek-V2's code fills with 0 instead. That gives the same layer as long as nothing is
    negative; with a bias it would let a token leave its groups.
    """
    if n_kept < n_groups:
        grouped_NGS = scores_NE.unflatten(-1, (n_groups, -1))
        best_NG = grouped_NGS.topk(2, dim=-1).values.sum(-1) if top_two else grouped_NGS.amax(-1)
        barred_NG = torch.ones_like(best_NG, dtype=torch.bool)
        barred_NG = barred_NG.scatter(-1, top_ids(best_NG, n_kept), False)
        scores_NE = grouped_NGS.masked_fill(barred_NG[..., None], -torch.inf).flatten(-2)
    return top_ids(scores_NE, top_k)
