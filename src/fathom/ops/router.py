"""Which experts a token goes to: the best scores, within the best groups if those are limited.

Equal scores go to the lowest index, on every device, so that a run can be repeated and a
recomputed forward chooses as the first did.

Shapes: N tokens, D model dim, E experts, K chosen per token, G groups of S neighbours.
"""

import torch
from torch import Tensor

from fathom.ops.registry import Impl, Implementations, choose, needs_triton, op, takes_all
from fathom.ops.top_ids import top_ids


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernel needs: float32 scores on CUDA."""
    if reason := needs_triton(device, dtype):
        return reason
    return "" if not tensors or dtype == torch.float32 else f"it needs float32 scores, got {dtype}"


ROUTER = Implementations(op="router", refusals={"triton": triton_refusal, "reference": takes_all})


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
