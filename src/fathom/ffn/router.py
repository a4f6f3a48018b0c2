"""The router: which experts a token goes to, and with what weight.

``logits = x W^T``, ``scores = softmax | sigmoid | sqrt(softplus)`` of them, ``expert_ids`` = the
``top_k`` best of ``scores + expert_bias``, ``gates`` = their scores *without* the bias, normalised
if asked, times ``route_scale``. All of it in float32, whatever the model's dtype.

Group-limited choice first keeps ``n_limited_groups`` of ``n_expert_groups`` groups of neighbouring
experts, by their best score (DeepSeek-V2, arXiv:2405.04434, section 2.2.2) or by the sum of their
two best (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Equal scores go to the lowest index.

Shapes: N tokens, D model dim, E experts, K chosen per token, G groups.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fathom.layers.base import Config, require, require_positive
from fathom.ops.router import best_experts, router_logits

MAX_EXPERTS = 4096  # a small file must not ask for a huge model


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Config):
    """The routing part of an MoE's config.

    Args:
        n_routed_experts: E.
        top_k: experts per token.
        score_func: how a logit becomes a score.
        n_expert_groups: groups of E / G neighbours.
        n_limited_groups: groups a token may use; all of them: no limit.
        group_score: a group's score, its best expert's (V2) or the sum of its two best (V3).
        norm_topk_prob: divide the chosen scores by their sum (+ 1e-20).
        route_scale: factor of the gates, after normalising.
    """

    n_routed_experts: int
    top_k: int
    score_func: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    norm_topk_prob: bool = False
    route_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "n_routed_experts", "top_k", "n_expert_groups", "n_limited_groups")
        experts, groups = self.n_routed_experts, self.n_expert_groups
        require(
            experts <= MAX_EXPERTS,
            f"n_routed_experts must be at most {MAX_EXPERTS}, got {experts}",
        )
        require(
            experts % groups == 0,
            f"n_expert_groups must divide n_routed_experts ({experts}), got {groups}: "
            "groups are of equal size",
        )
        require(
            self.n_limited_groups <= groups,
            f"n_limited_groups must be at most n_expert_groups ({groups}), "
            f"got {self.n_limited_groups}: there are no more groups to keep",
        )
        require(
            self.group_score == "max" or groups == 1 or experts // groups >= 2,
            f"group_score = 'top2' needs groups of at least 2 experts, got {experts // groups}: "
            "it adds a group's two best scores; use fewer n_expert_groups or group_score = 'max'",
        )
        allowed = experts // groups * self.n_limited_groups
        require(
            self.top_k <= allowed,
            f"top_k must be at most {allowed}, got {self.top_k}: a token may use "
            f"{self.n_limited_groups} of {groups} groups of {experts // groups} experts",
        )
        require(
            math.isfinite(self.route_scale) and self.route_scale > 0,
            f"route_scale must be a positive number, got {self.route_scale}",
        )


class Choice(NamedTuple):
    """What the router decided about N tokens. float32 (float64 in a float64 model).

    Args:
        expert_ids_NK: int64, the best first.
        gates_NK: the weight of each choice.
        scores_NE: all scores, for the balance losses.
        logits_NE: what the scores were made of.
    """

    expert_ids_NK: Tensor
    gates_NK: Tensor
    scores_NE: Tensor
    logits_NE: Tensor


def sqrt_softplus(logits: Tensor) -> Tensor:
    """``sqrt(log(1 + exp(x)))``; clamped, so that its slope stays finite where softplus is 0."""
    return softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}


class Router(nn.Module):
    """``forward(x_ND) -> Choice``. Nothing is changed by a forward.

    Args:
        cfg: the rule.
        dim: width of x.
        expert_bias: hold a float32 buffer ``expert_bias`` [E] that is added to the scores for the
            choice alone. It stays float32 when the module is cast.
    """

    expert_bias: Tensor | None

    def __init__(self, cfg: RouterConfig, dim: int, *, expert_bias: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, dim))
        bias = torch.zeros(cfg.n_routed_experts, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_ND: Tensor) -> Choice:
        with _no_autocast(x_ND.device.type):
            logits_NE = router_logits(x_ND, self.weight)
        return route(logits_NE, self.expert_bias, self.cfg)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "Router":  # every .to(), .bfloat16(), .cuda() passes here
        """Move the bias as all else, but do not cast it: bf16 would lose the steps of 1e-3."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None:
            moved = self.expert_bias
            self.expert_bias = moved if moved.dtype == torch.float32 else before.to(moved.device)
        return self


def route(logits_NE: Tensor, expert_bias_E: Tensor | None, cfg: RouterConfig) -> Choice:
    """The rule alone: logits to expert ids and gates.

    Args:
        logits_NE: float32 or float64.
        expert_bias_E: added to the scores for the choice, not for the gates; or None.
        cfg: the rule.
    """
    scores_NE = SCORES[cfg.score_func](logits_NE)
    choice_NE = scores_NE.detach()
    if expert_bias_E is not None:
        choice_NE = choice_NE + expert_bias_E
    expert_ids_NK = best_experts(
        choice_NE,
        cfg.top_k,
        n_groups=cfg.n_expert_groups,
        n_kept=cfg.n_limited_groups,
        top_two=cfg.group_score == "top2",
    )
    gates_NK = scores_NE.gather(-1, expert_ids_NK)
    if cfg.norm_topk_prob:
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return Choice(expert_ids_NK, gates_NK * cfg.route_scale, scores_NE, logits_NE)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off: the router's product stays float32."""
    if device_type == "meta":  # which has none to switch off
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
