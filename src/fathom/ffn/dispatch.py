"""Tokens to their experts and back, on one rank.

Another dispatcher (``parallel/ep.py``) has the same methods: an MoE's ``dispatcher`` can be
replaced once it is built. No token is ever dropped, whatever the load.

Shapes: N tokens, D model dim, E experts, K chosen per token, P = N K rows sorted by expert.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fathom.ops.permute import Permutation, combine, gather, sort_by_expert


@dataclass(frozen=True)
class Dispatched:
    """Rows at their experts, and the way back.

    Args:
        rows_PD: a copy of its token for each choice, sorted by expert, then by token.
        ends_E: end of each expert's rows.
        tokens_per_expert: int64 ``[E]``, of the tokens that left here.
        permutation: which row is whose.
    """

    rows_PD: Tensor
    ends_E: Tensor
    tokens_per_expert: Tensor
    permutation: Permutation

    def arrived(self) -> "Dispatched":
        """Rows that never left are there."""
        return self


class Sending(Protocol):
    """Rows on their way to experts, perhaps on another rank."""

    def arrived(self) -> Dispatched:
        """The rows for the experts that are here, once they have come."""
        ...


class Dispatcher(Protocol):
    """How an MoE sends tokens to experts and gets their answers back."""

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor) -> Sending:
        """Send a row for every (token, choice) pair, sorted by expert."""
        ...

    def combine(self, rows_PD: Tensor, gates_NK: Tensor, sent: Dispatched) -> Tensor:
        """``[N, D]``: each token's rows, weighted by its gates and summed."""
        ...


class LocalDispatcher:
    """All experts are here: sort, gather, and a gather-sum back."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor) -> Dispatched:
        permutation = sort_by_expert(expert_ids_NK, self.n_experts)
        rows_PD = gather(x_ND, permutation, expert_ids_NK.shape[1])
        return Dispatched(rows_PD, permutation.ends, permutation.counts, permutation)

    def combine(self, rows_PD: Tensor, gates_NK: Tensor, sent: Dispatched) -> Tensor:
        return combine(rows_PD, gates_NK, sent.permutation)
