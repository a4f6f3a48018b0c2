"""Linear and embedding layers whose weights are set later, all at once, by ``fathom.model.init``.

Neither runs torch's own initialisation: it would cost time and draw from the global generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fathom.ops.linear import linear


class Linear(nn.Linear):
    """``y = x @ weight.T (+ bias)`` with ``weight [out, in]``; without a bias unless asked.

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: add a learned vector.

    Attributes:
        joined: a weight whose first rows are this one's, and the rest those of its neighbours, see
            :func:`store_joined`.
    """

    joined: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: ``fathom.model.init`` gives the values."""


def store_joined(*layers: Linear) -> None:
    """Store the weights of several layers of one input as parts of one, columns first.

    Shapes, values and files stay; :func:`each_of` then reads them in one pass.
    """
    rows_OI = torch.cat([layer.weight.data for layer in layers])
    joined_OI = layers[0].joined = rows_OI.t().contiguous().t()
    parts = joined_OI.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.data = part


def each_of(x: Tensor, *layers: Linear) -> Sequence[Tensor]:
    """Every layer's product with x: one product where :func:`store_joined` made them one."""
    joined = layers[0].joined
    if joined is None or joined.data_ptr() != layers[0].weight.data_ptr():  # as after .to(dtype)
        return [layer(x) for layer in layers]
    return linear(x, joined).split([layer.out_features for layer in layers], dim=-1)


class Embedding(nn.Embedding):
    """``weight [num, dim]``; a lookup by token id."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Nothing: ``fathom.model.init`` gives the values."""
