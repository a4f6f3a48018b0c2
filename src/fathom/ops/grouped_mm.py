"""Each expert's rows times its weight, in one call: the matmul of a mixture of experts.

``torch`` is ``F.grouped_mm``: on CUDA (bf16, Hopper and later) one launch without a host
synchronisation, on the CPU a loop in C++. It takes rows of whole 16-byte units only.

Shapes: N rows sorted by expert, D in, F out, E experts; ``ends_E`` int32, one past each last row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm as torch_grouped_mm

from fathom.ops.registry import (
    Impl,
    Implementations,
    autocast,
    choose,
    no_kernel,
    op,
    takes_all,
    wide,
)


def torch_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What ``F.grouped_mm`` needs."""
    if device == "cuda" and dtype != torch.bfloat16:
        return f"it needs bfloat16 on CUDA, got {dtype}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it needs float32, bfloat16 or float16, got {dtype}"
    widths = tensors[1].shape[1:] if tensors else ()
    if any(width * dtype.itemsize % 16 for width in widths):
        return f"it needs rows of whole 16-byte units, got widths {tuple(widths)} of {dtype}"
    return ""


GROUPED_MM = Implementations(
    op="grouped_mm",
    refusals={"triton": no_kernel, "torch": torch_refusal, "reference": takes_all},
)


def grouped_mm(x_ND: Tensor, w_EDF: Tensor, ends_E: Tensor, *, impl: Impl = "auto") -> Tensor:
    """``out[a:b] = x[a:b] @ w[e]`` with ``a, b = ends[e-1], ends[e]``: ``[N, F]`` in x's dtype.

    Sums are in float32 (float64 for float64). An expert may have no rows; ``ends[-1]`` must be N.
    ``w_EDF`` may be a transposed view of ``[E, F, D]``; its gradient then has that layout too.

    Raises:
        ValueError: x and w differ in D or dtype, or a refused ``impl``.
    """
    x_ND, w_EDF = autocast(x_ND, w_EDF)
    for what, x, w in (("D", x_ND.shape[1], w_EDF.shape[1]), ("dtype", x_ND.dtype, w_EDF.dtype)):
        if x != w:
            raise ValueError(f"grouped_mm needs x and w of one {what}, got {x} and {w}")
    return _grouped_mm(x_ND, w_EDF, ends_E, choose(GROUPED_MM, impl, x_ND, w_EDF))


def grouped_mm_reference(x_ND: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The definition, one expert at a time: slow, differentiable, on any device and dtype."""
    dtype = wide(x_ND.dtype)
    ends = ends_E.tolist()
    rows = zip([0, *ends[:-1]], ends, w_EDF, strict=True)
    return torch.cat([x_ND[a:b].to(dtype) @ w.to(dtype) for a, b, w in rows]).to(x_ND.dtype)


def grouped_outer_reference(x_ND: Tensor, y_NF: Tensor, ends_E: Tensor) -> Tensor:
    """``out[e] = x[a:b]^T @ y[a:b]``: the gradient of a weight, ``[E, D, F]``."""
    dtype = wide(x_ND.dtype)
    ends = ends_E.tolist()
    spans = zip([0, *ends[:-1]], ends, strict=True)
    products = [x_ND[a:b].to(dtype).T @ y_NF[a:b].to(dtype) for a, b in spans]
    return torch.stack(products).to(x_ND.dtype)


@op(
    "grouped_outer",
    fake=lambda x, y, ends, impl: x.new_empty(ends.shape[0], x.shape[1], y.shape[1]),
    flops=lambda x, y, *_: 2 * x[0] * x[1] * y[1],
)
def _grouped_outer(x_ND: Tensor, y_NF: Tensor, ends_E: Tensor, impl: str) -> Tensor:
    run = grouped_outer_reference if impl == "reference" else torch_outer
    return run(x_ND, y_NF, ends_E)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_ND, w_EDF, ends_E, ctx.impl = inputs
    ctx.save_for_backward(x_ND, w_EDF, ends_E)


def _backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, w_EDF, ends_E = ctx.saved_tensors
    dx_ND = dw_EDF = None
    if ctx.needs_input_grad[0]:
        dx_ND = _grouped_mm(grad_NF, w_EDF.transpose(1, 2), ends_E, ctx.impl)
    if ctx.needs_input_grad[1] and w_EDF.stride(1) == 1:  # stored as [E, F, D]: so is its gradient
        dw_EDF = _grouped_outer(grad_NF, x_ND, ends_E, ctx.impl).transpose(1, 2)
    elif ctx.needs_input_grad[1]:
        dw_EDF = _grouped_outer(x_ND, grad_NF, ends_E, ctx.impl)
    return dx_ND, dw_EDF, None, None


@op(
    "grouped_mm",
    fake=lambda x, w, ends, impl: x.new_empty(x.shape[0], w.shape[2]),
    flops=lambda x, w, *_: 2 * x[0] * w[1] * w[2],
    setup=_setup,
    backward=_backward,
)
def _grouped_mm(x_ND: Tensor, w_EDF: Tensor, ends_E: Tensor, impl: str) -> Tensor:
    run = grouped_mm_reference if impl == "reference" else torch_product
    return run(x_ND, w_EDF, ends_E)


def torch_product(x_ND: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The product by ``F.grouped_mm``."""
    if not x_ND.shape[0]:
        return x_ND.new_zeros(0, w_EDF.shape[2])
    w_EDF = aligned(w_EDF.mT).mT if w_EDF.stride(1) == 1 else aligned(w_EDF)
    return torch_grouped_mm(aligned(x_ND), w_EDF, offs=ends_E)


def torch_outer(x_ND: Tensor, y_NF: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient of a weight by ``F.grouped_mm``."""
    if not x_ND.shape[0]:
        return x_ND.new_zeros(ends_E.shape[0], x_ND.shape[1], y_NF.shape[1])
    return torch_grouped_mm(aligned(x_ND).T, aligned(y_NF), offs=ends_E)


def aligned(x: Tensor) -> Tensor:
    """x if its last dimension is dense and the others step by whole 16 bytes; else a copy that is.

    A kernel that was given other rows once returned wrong products without an error (pytorch pull
    request 150374).
    """
    whole = all(step > 0 and step * x.itemsize % 16 == 0 for step in x.stride()[:-1])
    if x.stride(-1) == 1 and whole and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
