"""How an op is registered, and which of its implementations runs.

An op is a contract with several implementations: ``reference`` (plain PyTorch, the definition),
``torch`` (the fast path PyTorch ships) and ``triton`` (our kernel). ``auto`` takes the first that can
run, fastest first; a forced one is honoured or refused with a sentence, never swapped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

Impl = Literal["auto", "reference", "torch", "triton"]

Refusal = Callable[..., str]
"""``refusal(device_type, dtype, *tensors)``: what is missing ("it needs ..."), or "" if it can run.

Called without tensors it answers for a device and a dtype alone.
"""


def runs_anywhere(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """The refusal of an implementation that takes everything."""
    return ""


def no_kernel_yet(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """The refusal of a kernel that is not written."""
    return "it needs a Triton kernel, and this op has none yet"


@dataclass(frozen=True, kw_only=True)
class Implementations:
    """An op's implementations, fastest first, each with what stops it."""

    op: str
    refusals: Mapping[str, Refusal]

    def why_not(self, impl: str, device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
        """The sentence that says what ``impl`` lacks; "" if it can run."""
        return self.refusals[impl](device, dtype, *tensors)

    def auto(self, device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
        """The first implementation that can run."""
        able = (i for i in self.refusals if not self.why_not(i, device, dtype, *tensors))
        return next(able)


def choose(implementations: Implementations, impl: Impl, *tensors: Tensor) -> str:
    """The name of the implementation that runs on ``tensors``.

    Raises:
        ValueError: a forced ``impl`` is unknown or cannot run; the sentence says what it needs.
    """
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if impl == "auto":
        return implementations.auto(device, dtype, *tensors)
    if impl not in implementations.refusals:
        known = ", ".join(["auto", *implementations.refusals])
        raise ValueError(
            f"impl={impl!r} of {implementations.op} is not known; choose from: {known}"
        )
    if reason := implementations.why_not(impl, device, dtype, *tensors):
        fallback = implementations.auto(device, dtype, *tensors)
        raise ValueError(
            f"impl={impl!r} cannot run: {reason}; pass impl='auto' for the {fallback} implementation"
        )
    return impl


def op(
    name: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of tensors as ``torch.ops.fathom.<name>``, opaque to ``torch.compile``.

    Args:
        name: the op's name.
        fake: same arguments, outputs of the right shape, dtype and strides without computing.
        flops: same arguments with shapes in place of tensors, and ``out_shape``; 2 per multiply-add.
        backward: ``backward(ctx, *grads)``, one gradient or None for each argument.
        setup: ``setup(ctx, inputs, output)``: what backward needs.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        custom = torch.library.custom_op(f"fathom::{name}", function, mutates_args=())
        custom.register_fake(fake)
        if backward is not None:
            custom.register_autograd(backward, setup_context=setup)
        register_flop_formula(getattr(torch.ops.fathom, name))(flops)
        return custom

    return register


def count_flops_if_torch_does_not(packet: Any, flops: Callable[..., int]) -> None:
    """Give ``FlopCounterMode`` a formula for an op of torch's own that it does not know."""
    if packet not in flop_registry:
        register_flop_formula(packet)(flops)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that an enclosing ``torch.autocast`` asks matmuls to run in."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)
