"""The gated SwiGLU between an expert layer's two products: ``a = gate * silu(h_gate) * h_up``.

The router's gate weighs the activation, ``[P, I]``, not the expert's answer, ``[P, D]``: a product
is linear, and the inner width of small experts is less than the model's. What multiplies the gate's
gradient is then ``<da, a>``, so no expert's answer has to be kept (SonicMoE, arXiv:2512.14080).

Shapes: P rows in expert order, I one expert's inner width; ``h_P2I`` holds gate, then up channels;
``gates_P`` is in the order of pairs, of which row p is ``order[p]``.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from fathom.ops.registry import wide


def swiglu(h_P2I: Tensor, gates_P: Tensor, order_P: Tensor) -> Tensor:
    """``gates[order[p]] * silu(h[p, :I]) * h[p, I:]``, ``[P, I]``, rounded once to h's dtype."""
    gate_PI, up_PI = h_P2I.to(wide(h_P2I.dtype)).chunk(2, dim=-1)
    a_PI = silu(gate_PI).mul_(up_PI)
    return a_PI.mul_(gates_P.index_select(0, order_P)[:, None]).to(h_P2I.dtype)


def swiglu_backward(
    h_P2I: Tensor, gates_P: Tensor, order_P: Tensor, da_PI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the activation, which may be overwritten: ``(dh, dgates, a)``.

    ``dgates_P`` is in the order of pairs, 0 for those without a row; ``a`` is :func:`swiglu`'s
    result once more.
    """
    dtype = wide(h_P2I.dtype)
    gate_PI, up_PI = h_P2I.to(dtype).chunk(2, dim=-1)
    weight_P1 = gates_P.index_select(0, order_P)[:, None]
    da_PI = da_PI.to(dtype)
    silu_PI = silu(gate_PI)
    a_PI = silu_PI * up_PI
    dgates_P = torch.zeros_like(gates_P, dtype=dtype)
    dgates_P.index_copy_(0, order_P, (da_PI * a_PI).sum(-1))
    da_PI = da_PI.mul_(weight_P1)
    dh_P2I = torch.empty_like(h_P2I, dtype=dtype)
    dgate_PI, dup_PI = dh_P2I.chunk(2, dim=-1)
    torch.mul(da_PI, silu_PI, out=dup_PI)
    torch.ops.aten.silu_backward.grad_input(da_PI.mul_(up_PI), gate_PI, grad_input=dgate_PI)
    a_PI = a_PI.mul_(weight_P1).to(h_P2I.dtype)
    return dh_P2I.to(h_P2I.dtype), dgates_P.to(gates_P.dtype), a_PI
