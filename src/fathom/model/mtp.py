"""Multi-token prediction: DeepSeek-V3, arXiv:2412.19437, section 2.2.

Module k joins the hidden state of token i with the embedding of token i + k and predicts token
i + k + 1 through one more block and the model's own head. It gives training more signal per token;
at inference it is not run unless asked. The join is ``[embedding; hidden]``, as every released
checkpoint stores ``eh_proj`` (the paper's equation 21 writes the other order).

Shapes: B batch, T tokens, D model dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.attention import Indexing
from fathom.config import ModelConfig
from fathom.ffn import Routing
from fathom.layers.linear import Linear
from fathom.layers.norm import RMSNorm
from fathom.layers.step import Step
from fathom.model.block import Block

IGNORE = -100


class MTPOutput(NamedTuple):
    """One module's result: the state for the head, and before its norm; routing and indexing."""

    states_BTD: Tensor
    before_norm_BTD: Tensor
    routing: Routing | None
    indexing: Indexing | None


class MTPModule(nn.Module):
    """One further prediction depth."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hnorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.eh_proj = Linear(2 * cfg.dim, cfg.dim)
        self.block = Block(cfg.groups[-1], cfg.dim, cfg.norm_eps)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, embedded_BTD: Tensor, hidden_BTD: Tensor, step: Step) -> MTPOutput:
        """``embedded`` is of the token ``k`` places after that of ``hidden``."""
        joined = torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1)
        x_BTD, routing, indexing = self.block(self.eh_proj(joined), step)
        return MTPOutput(self.norm(x_BTD), x_BTD, routing, indexing)


def targets_ahead(targets_BT: Tensor, positions_BT: Tensor, depth: int) -> Tensor:
    """Targets ``depth`` further on, ``[B, T - depth]``: -100 where another document has begun."""
    ahead = targets_BT[:, depth:]
    same = positions_BT[:, depth:] == positions_BT[:, :-depth] + depth
    return torch.where(same, ahead, IGNORE)
