"""Tokens to their experts and back, on one rank.

Another dispatcher (``parallel/ep.py``) has the same methods: an MoE's ``dispatcher`` can be
replaced once it is built. No token is ever dropped, whatever the load.

Shapes: N tokens, D model dim, E experts, K chosen per token.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fathom.ffn.experts import Experts
from fathom.ops.permute import Permutation, sort_by_expert


class Sending(Protocol):
    """Tokens on their way to experts, perhaps on another rank."""

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 ``[E]``, of the tokens that left here."""
        ...

    @property
    def reach(self) -> Tensor | None:
        """See :class:`fathom.ffn.base.Routing`."""
        ...

    def through(self, experts: Experts, gates_NK: Tensor) -> Tensor:
        """Once they are there, through the experts and back, weighted by the gates: ``[N, D]``."""
        ...


class Dispatcher(Protocol):
    """How an MoE sends tokens to experts."""

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor) -> Sending:
        """Send each token to its K experts."""
        ...


@dataclass(frozen=True)
class Here:
    """Tokens whose experts are all here: they never leave, and one op does all the work."""

    x_ND: Tensor
    permutation: Permutation

    @property
    def tokens_per_expert(self) -> Tensor:
        return self.permutation.counts

    @property
    def reach(self) -> None:
        return None

    def through(self, experts: Experts, gates_NK: Tensor) -> Tensor:
        return experts(self.x_ND, gates_NK, self.permutation)


class LocalDispatcher:
    """All experts are here."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor) -> Here:
        return Here(x_ND, sort_by_expert(expert_ids_NK, self.n_experts))
