"""Linear and embedding layers whose weights are set later, all at once, by ``fathom.model.init``.

Neither runs torch's own initialisation: it would cost time and draw from the global generator.
"""

from torch import Tensor, nn

from fathom.ops.linear import linear


class Linear(nn.Linear):
    """``y = x @ weight.T (+ bias)`` with ``weight [out, in]``; without a bias unless asked.

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: add a learned vector.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: ``fathom.model.init`` gives the values."""


class Embedding(nn.Embedding):
    """``weight [num, dim]``; a lookup by token id."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Nothing: ``fathom.model.init`` gives the values."""
