"""How an op is registered, and which of its implementations runs.

An op is a contract with several implementations: ``reference`` (plain PyTorch, the definition),
``torch`` (the fast path that PyTorch ships) and ``triton`` (our kernel). ``auto`` takes the fastest
that can run; a forced one is honoured or refused with a sentence, never swapped for another.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Args = ParamSpec("Args")
Result = TypeVar("Result")
Impl = Literal["auto", "reference", "torch", "triton"]

Refusal = Callable[..., str]
"""``refusal(device_type, dtype, *tensors)``: "it needs ..., got ...", or "" if nothing is missing.

Called without tensors it answers for a device and a dtype alone.
"""

HAS_TRITON = importlib.util.find_spec("triton") is not None


def takes_all(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """The refusal of an implementation that runs everywhere."""
    return ""


def no_kernel(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """The refusal of a kernel that is not written."""
    return "it needs a kernel, and there is no Triton kernel of this op yet"


def needs_triton(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """The refusal of a kernel that takes all that is on a GPU."""
    if device != "cuda":
        return f"it needs CUDA tensors, got {device}"
    return "" if HAS_TRITON else "it needs Triton, which is not installed"


def kernel_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """The refusal of a kernel for tensors that are not empty, of at most float32."""
    if reason := needs_triton(device, dtype):
        return reason
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it needs bfloat16, float16 or float32, got {dtype}"
    if any(t.numel() == 0 for t in tensors):
        return f"it needs tensors with elements, got shapes {[tuple(t.shape) for t in tensors]}"
    return ""


MAX_WIDTH = 256  # of queries, keys and values, in the kernels of attention
MAX_ROWS = 128  # query heads that read the same keys, in these kernels


def shape_refusal(rows: int, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What they need where ``rows`` query heads read the same keys."""
    if rows > MAX_ROWS:
        return f"it needs at most {MAX_ROWS} query heads that read the same keys, got {rows}"
    return width_refusal(q, k, v)


def width_refusal(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> str:
    """What the kernels of attention need of queries, keys and values."""
    if not q.dtype == k.dtype == v.dtype:
        return f"it needs one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    widths = (q.shape[-1], v.shape[-1])
    if any(width % 8 or width > MAX_WIDTH for width in widths):
        return f"it needs widths that are multiples of 8 up to {MAX_WIDTH}, got {widths}"
    return ""


@dataclass(frozen=True, kw_only=True)
class Implementations:
    """What stops each implementation of an op, fastest first; the last runs everywhere."""

    op: str
    refusals: Mapping[str, Refusal]

    def why_not(self, impl: str, device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
        """What ``impl`` lacks to run on these tensors; "" if it can."""
        return self.refusals[impl](device, dtype, *tensors)

    def fastest(self, device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
        """The first implementation that can run, which ``auto`` takes."""
        return next(i for i in self.refusals if not self.why_not(i, device, dtype, *tensors))


def choose(implementations: Implementations, impl: Impl, *tensors: Tensor) -> str:
    """The name of the implementation that runs on ``tensors``.

    Raises:
        ValueError: a forced ``impl`` is unknown, or cannot run; the sentence says what it needs.
    """
    device, dtype = tensors[0].device.type, tensors[0].dtype
    fastest = implementations.fastest(device, dtype, *tensors)
    if impl == "auto":
        return fastest
    if impl not in implementations.refusals:
        known = ", ".join(["auto", *implementations.refusals])
        raise ValueError(f"impl={impl!r} is not known to {implementations.op}: it has {known}")
    if reason := implementations.why_not(impl, device, dtype, *tensors):
        raise ValueError(f"impl={impl!r} cannot run: {reason}; pass impl='auto' for {fastest!r}")
    return impl


def op(
    name: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    mutates: Sequence[str] = (),
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Register a function as ``torch.ops.fathom.<name>``, opaque to ``torch.compile``.

    It runs with the device of its first tensor as the current one, to which Triton launches;
    tensors may stand in lists.

    Args:
        name: the op's name.
        fake: called as the function is; tensors of the same shape, dtype and strides, uncomputed.
        flops: called as the function is, with shapes for tensors; 2 per multiply-add.
        mutates: the names of arguments that it changes in place.
        setup: ``setup(ctx, inputs, output)`` keeps what the backward needs.
        backward: ``backward(ctx, *grads)`` gives a gradient or None for each argument.
    """

    def register(function: Callable[Args, Result]) -> Callable[Args, Result]:
        @functools.wraps(function)
        def on_its_device(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            leaves = (t for a in args for t in (a if isinstance(a, list) else [a]))
            with torch.cuda.device_of(next(t for t in leaves if isinstance(t, Tensor))):
                return function(*args, **kwargs)

        custom = torch.library.custom_op(f"fathom::{name}", on_its_device, mutates_args=mutates)
        custom.register_fake(fake)
        if backward is not None:
            custom.register_autograd(backward, setup_context=setup)
        packet = getattr(torch.ops.fathom, name)
        register_flop_formula(packet)(lambda *shapes, out_shape=None, **_: flops(*shapes))
        return cast(Callable[Args, Result], custom)

    return register


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that an enclosing ``torch.autocast`` wants matmuls to run in."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over ``dtype`` are computed in: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
