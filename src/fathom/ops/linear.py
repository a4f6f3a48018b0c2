"""A linear layer: ``x @ weight.T + bias``.

For a few rows the time is that of reading the weight. On a CPU PyTorch hands such a product to a
BLAS that reads with one thread; the same product in parts, as a batch, reads with all of them.

Shapes: N rows of x, I input width, O output width, P parts.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS = 32  # from there on the products are limited by arithmetic, and BLAS shares them out


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``[..., I]`` to ``[..., O]``, in x's dtype."""
    if not few_rows_on_a_cpu(x, weight_OI):
        return functional.linear(x, weight_OI, bias_O)
    columns_first = weight_OI.stride(0) == 1
    n_parts = math.gcd(weight_OI.shape[int(columns_first)], torch.get_num_threads())
    if n_parts == 1:
        return functional.linear(x, weight_OI, bias_O)
    by_part = by_columns if columns_first else by_rows
    y = by_part(x.reshape(-1, x.shape[-1]), weight_OI, n_parts).view(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


def few_rows_on_a_cpu(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether the weight is what is read: few float32 rows, and no gradient is wanted."""
    return (
        0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()
    )


def by_rows(x_NI: Tensor, weight_OI: Tensor, n_parts: int) -> Tensor:
    """Each part gives some of the outputs: ``[N, O]``."""
    weight_PIO = weight_OI.unflatten(0, (n_parts, -1)).transpose(1, 2)
    y_PNO = torch.bmm(x_NI.expand(n_parts, -1, -1), weight_PIO)
    return y_PNO.transpose(0, 1).flatten(1)


def by_columns(x_NI: Tensor, weight_OI: Tensor, n_parts: int) -> Tensor:
    """Each part reads some of the inputs, and the parts are added up: ``[N, O]``."""
    x_PNI = x_NI.unflatten(1, (n_parts, -1)).transpose(0, 1)
    weight_PIO = weight_OI.t().unflatten(0, (n_parts, -1))
    return torch.bmm(x_PNI, weight_PIO).sum(0)
