"""A kernel proves itself on the device it is to run on, once, before ``auto`` takes it.

Compilers of kernels have given silently wrong results on one device with one version. So the first
call on a device compares the kernel, forward and backward, with its definition in float64 on small
random inputs; what fails is left to PyTorch, and said. A kernel that is asked for runs unproven.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PROVEN = "proven"  # the implementation of an op that is ``triton`` if that proves itself
LARGEST_ERROR = 2e-2  # of bfloat16 results, which plain PyTorch gives to about 4e-3

Pairs = Iterable[tuple[Tensor, Tensor]]
Check = Callable[[torch.device], Pairs]
"""``check(device)``: results of the kernel, each with what it should be in float64."""


def settle(impl: str, check: Check, device: torch.device) -> str:
    """``triton`` or ``torch`` for ``PROVEN``; any other name as it is."""
    if impl != PROVEN:
        return impl
    return "triton" if proves(check, device) else "torch"


@functools.cache
def proves(check: Check, device: torch.device) -> bool:
    """Whether every result of ``check`` is right on this device; waits for it."""
    try:
        with _waiting_allowed(device):
            worst = max(_error(got, want) for got, want in check(device))
    except Exception as error:  # a compiler may raise anything
        found = f"raised {type(error).__name__}: {error}"
    else:
        if worst <= LARGEST_ERROR:
            return True
        found = f"has a relative error of {worst:.2g}"
    warnings.warn(f"{check.__module__}: its kernel {found}; PyTorch does its work", stacklevel=2)
    return False


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Whatever ``torch.cuda.set_sync_debug_mode`` says: this happens once."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _error(got: Tensor, want: Tensor) -> float:
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")  # NaN


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers that do not depend on, or move, the global generator."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)
