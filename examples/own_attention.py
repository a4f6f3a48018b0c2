"""Your own attention in the ladder: multi-head attention whose heads are gated by their input.

    out = wo(sigmoid(x @ w_gate) * heads)      one gate per head and token (arXiv:2505.06708)

A head can then say "nothing here" without parking its weight on some token. Its study trains it
beside the same attention without the gate:

    fathom ladder examples/own_attention.toml --import examples/own_attention.py

Shapes: B batch, T new tokens, D model dim, H heads, V value width.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import fathom
from fathom.attention.mha import MHA, MHAConfig
from fathom.layers.linear import Linear


@dataclass(frozen=True, kw_only=True)
class GatedConfig(MHAConfig):
    """The keys of MHA; the calculators learn of the further weights here."""

    kind: Literal["gated"] = "gated"  # pyright: ignore

    def build(self, dim: int) -> "Gated":
        return Gated(self, dim)

    def num_params(self, dim: int) -> int:
        return super().num_params(dim) + dim * self.n_heads

    def projection_flops(self, dim: int) -> int:
        return super().projection_flops(dim) + 2 * dim * self.n_heads


class Gated(MHA):
    """MHA's projections, cache and mask; what differs is the last line."""

    def __init__(self, cfg: GatedConfig, dim: int) -> None:
        super().__init__(cfg, dim)
        self.w_gate = Linear(dim, cfg.n_heads)

    def forward(self, x_BTD: Tensor, step: fathom.Step) -> Tensor:
        gate_BTH = self.w_gate(x_BTD).sigmoid()
        return self.wo((gate_BTH[..., None] * self.heads(x_BTD, step)).flatten(-2))


fathom.register_attention("gated", GatedConfig)
