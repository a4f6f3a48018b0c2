"""The routed experts: all weights stacked, and the whole layer as one op.

Gate and up are one tensor (gate rows first), so that the sorted tokens are read once.

Shapes: N tokens, K experts per token, D model dim, E experts, I one expert's inner dim.
"""

import torch
from torch import Tensor, nn

from fathom.ops.experts import experts
from fathom.ops.permute import Permutation


class Experts(nn.Module):
    """E SwiGLUs. ``w_gate_up [E, 2I, D]``, ``w_down [E, D, I]``: each a stack of ``[out, in]``."""

    def __init__(self, n_experts: int, dim: int, inter_dim: int) -> None:
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(n_experts, 2 * inter_dim, dim))
        self.w_down = nn.Parameter(torch.empty(n_experts, dim, inter_dim))

    def forward(self, x_ND: Tensor, gates_NK: Tensor, permutation: Permutation) -> Tensor:
        """Each token through its experts here, weighted by its gates and summed: ``[N, D]``."""
        return experts(x_ND, self.w_gate_up, self.w_down, gates_NK, permutation)
