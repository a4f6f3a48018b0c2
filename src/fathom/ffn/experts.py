"""The routed experts: all weights stacked, two grouped products over tokens sorted by expert.

Where all experts are at hand, ``routed`` does the whole layer in one op; where tokens have to
travel first, ``forward`` does the experts' part on the rows that came. Gate and up are one tensor
(gate rows first), so that the sorted tokens are read once.

Shapes: N tokens, K experts per token, P (token, choice) pairs sorted by expert, D model dim,
E experts, I one expert's inner dim.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fathom.ops.experts import experts
from fathom.ops.grouped_mm import grouped_mm
from fathom.ops.permute import Permutation


class Experts(nn.Module):
    """E SwiGLUs. ``w_gate_up [E, 2I, D]``, ``w_down [E, D, I]``: each a stack of ``[out, in]``."""

    def __init__(self, n_experts: int, dim: int, inter_dim: int) -> None:
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(n_experts, 2 * inter_dim, dim))
        self.w_down = nn.Parameter(torch.empty(n_experts, dim, inter_dim))

    def forward(self, rows_PD: Tensor, ends_E: Tensor) -> Tensor:
        """Expert e works on rows ``ends[e-1]`` to ``ends[e]``; rows and result ``[P, D]``."""
        gate_PI, up_PI = grouped_mm(rows_PD, self.w_gate_up.mT, ends_E).chunk(2, dim=-1)
        return grouped_mm(silu(gate_PI) * up_PI, self.w_down.mT, ends_E)

    def routed(self, x_ND: Tensor, gates_NK: Tensor, permutation: Permutation) -> Tensor:
        """Each token through its K experts, weighted by its gates and summed: ``[N, D]``."""
        return experts(x_ND, self.w_gate_up, self.w_down, gates_NK, permutation)
