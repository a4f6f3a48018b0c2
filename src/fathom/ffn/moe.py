"""DeepSeekMoE: many small experts, of which a token reads a few, and shared ones that all read.

``y = sum over chosen e of gate_e * SwiGLU_e(x) + SwiGLU_shared(x)`` (arXiv:2401.06066, eq. 9-11).
The shared experts are one MLP of their summed width, without a gate.

Shapes: B batch, T tokens, N = B T, D model dim, E routed experts, K chosen per token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fathom.ffn.balance import AnyBalance, AuxLossFree, SumOverRanks, alone, score_entropy
from fathom.ffn.base import FFN, FFNConfig, Routing, require_inter_dim
from fathom.ffn.dense import SwiGLU
from fathom.ffn.dispatch import Dispatcher, LocalDispatcher
from fathom.ffn.experts import Experts
from fathom.ffn.router import Choice, Router, RouterConfig
from fathom.layers.base import require
from fathom.layers.step import Step


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RouterConfig, FFNConfig):
    """Routed and shared experts; the routing fields are :class:`RouterConfig`'s.

    Args:
        inter_dim: inner width of one expert.
        n_shared_experts: experts that every token reads; 0: none.
        balance: ways of keeping the experts evenly used; their losses add up.
        expert_bias: hold a routing bias even without ``aux_loss_free``, as a checkpoint's
            fixed one.
    """

    kind: Literal["moe"] = "moe"
    inter_dim: int
    n_shared_experts: int = 0
    balance: tuple[AnyBalance, ...] = ()
    expert_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inter_dim(self.inter_dim)
        require(
            self.n_shared_experts >= 0,
            f"n_shared_experts must be at least 0, got {self.n_shared_experts}",
        )
        free = sum(isinstance(item, AuxLossFree) for item in self.balance)
        require(
            free <= 1,
            f"balance may hold aux_loss_free once, got it {free} times: there is one bias",
        )

    @property
    def has_expert_bias(self) -> bool:
        """Whether the router holds a bias: asked for, or moved by ``aux_loss_free``."""
        return self.expert_bias or any(isinstance(item, AuxLossFree) for item in self.balance)

    def build(self, dim: int) -> "MoE":
        return MoE(self, dim)

    def num_params(self, dim: int) -> int:
        return self._params(dim, self.n_routed_experts)

    def num_active_params(self, dim: int) -> int:
        return self._params(dim, self.top_k)

    def flops_per_token(self, dim: int) -> int:
        return 2 * self.num_active_params(dim)

    def _params(self, dim: int, routed: int) -> int:
        """Router and shared experts, and ``routed`` of the others."""
        experts = routed + self.n_shared_experts
        return self.n_routed_experts * dim + experts * 3 * dim * self.inter_dim


class MoE(FFN):
    """``forward(x_BTD, step) -> (y_BTD, Routing)``. No state is changed by a forward.

    ``dispatcher`` and ``sum_over_ranks`` may be replaced once the module is built, if it is one
    rank's part of a layer (``parallel/``). ``counts_before`` are the tokens per expert of the
    step's earlier micro-batches, of this rank; None: there are none.
    """

    def __init__(self, cfg: MoEConfig, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.router = Router(cfg, dim, expert_bias=cfg.has_expert_bias)
        self.experts = Experts(cfg.n_routed_experts, dim, cfg.inter_dim)
        self.shared: SwiGLU | None = None
        if cfg.n_shared_experts:
            self.shared = SwiGLU(dim, cfg.inter_dim * cfg.n_shared_experts)
        self.dispatcher: Dispatcher = LocalDispatcher(cfg.n_routed_experts)
        self.sum_over_ranks: SumOverRanks = alone
        self.counts_before: Tensor | None = None

    def forward(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        choice = self.router(x_ND)
        sending = self.dispatcher.dispatch(x_ND, choice.expert_ids_NK)
        shared_ND = None if self.shared is None else self.shared.mlp(x_ND)  # while rows travel
        balance_loss = self.balance_loss(choice, x_BTD.shape[0])
        y_ND = sending.through(self.experts, choice.gates_NK)
        if shared_ND is not None:
            y_ND = y_ND + shared_ND
        routing = Routing(
            balance_loss=balance_loss,
            tokens_per_expert=sending.tokens_per_expert,
            entropy=score_entropy(choice.scores_NE),
            reach=sending.reach,
        )
        return y_ND.view_as(x_BTD), routing

    def balance_loss(self, choice: Choice, batch_size: int) -> Tensor:
        """The sum of the balance losses, a scalar in the router's dtype."""
        zero = choice.scores_NE.new_zeros(())
        totals = {False: self.sum_over_ranks, True: self.sum_over_step}
        losses = (
            item.loss(choice, batch_size, totals[item.over_step]) for item in self.cfg.balance
        )
        return sum(losses, start=zero)

    def sum_over_step(self, counts_1E: Tensor) -> Tensor:
        """Of all ranks, and of the micro-batches before this one."""
        if self.counts_before is not None:
            counts_1E = counts_1E + self.counts_before
        return self.sum_over_ranks(counts_1E)

    @torch.no_grad()
    def update_expert_bias(self, counts_E: Tensor) -> None:
        """Move the routing bias, after an optimizer step; nothing without ``aux_loss_free``.

        Args:
            counts_E: tokens per expert over the whole step: all micro-batches, all ranks.
        """
        for item in self.cfg.balance:
            if isinstance(item, AuxLossFree):
                assert self.router.expert_bias is not None
                self.router.expert_bias += item.bias_step(counts_E)
