"""What a run runs on: the device, its limits, determinism, and compiled blocks."""

import functools
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fathom import __version__
from fathom.config import ModelConfig
from fathom.model import Decoder
from fathom.train.config import Device

try:
    import resource
except ImportError:  # Windows
    resource = None

# Dense bfloat16 FLOP/s of the data sheets; the first part found in the device's name counts.
PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("H200", 9.89e14),
    ("H100 PCIe", 7.56e14),
    ("H100", 9.89e14),
    ("H800", 9.89e14),
    ("A100", 3.12e14),
    ("A800", 3.12e14),
    ("L40S", 3.62e14),
    ("RTX 4090", 1.65e14),
    ("RTX 3090", 7.1e13),
)


def pick_device(name: Device) -> torch.device:
    """The device that ``train.device`` means.

    Raises:
        ValueError: it is asked for by name and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if not there[name]():
        raise ValueError(f"train.device={name}: this machine or this torch has none; use auto")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Within it, torch refuses operations whose result may differ from run to run.

    Raises:
        ValueError: CUDA runs already, with settings that do not allow this.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        if "CUBLAS_WORKSPACE_CONFIG" not in os.environ and torch.cuda.is_initialized():
            raise ValueError(
                "train.deterministic=true comes too late, CUDA is in use already: "
                "set CUBLAS_WORKSPACE_CONFIG=:4096:8 before"
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def compile_blocks(
    model: Decoder, warm_up: Callable[[], None], notice: Callable[[str], None]
) -> bool:
    """Compile every block in place, and run ``warm_up`` to see that it works.

    Compiling is lazy, so what cannot be compiled shows in the first pass. Then the blocks stay as
    they were and ``notice`` is told why.
    """
    _forget_others(model.cfg)
    blocks = [*model.blocks, *(module.block for module in model.mtp)]
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own, of no use to a user
            for block in blocks:
                block.compile()
            warm_up()
        return True
    except Exception as error:
        for block in blocks:
            block._compiled_call_impl = None  # how nn.Module.compile is undone
        model.zero_grad(set_to_none=True)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        notice(f"train.compile=true cannot be had here ({reason}); going on without it")
        return False


@functools.lru_cache(maxsize=1)
def _forget_others(cfg: ModelConfig) -> None:
    """Forget what was compiled, unless it was for this very model, another seed of a study's arm.

    Torch compiles one piece of code only eight times, and another model's blocks are the same code;
    what differs between them it would also take for a size that varies.
    """
    torch.compiler.reset()


@contextmanager
def uncompiled(model: Decoder) -> Iterator[None]:
    """Within it, compiled blocks run as they were written.

    What is not a training step comes in other shapes and without gradients, and each of those would
    be compiled anew.
    """
    blocks = [*model.blocks, *(module.block for module in model.mtp)]
    compiled = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = call


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU that we know; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS if part in name), None)


def memory_bytes(device: torch.device) -> int | None:
    """The most memory held so far: on a GPU by tensors, else by the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on: versions, device, threads, commit of the code."""
    cuda = device.type == "cuda"
    return {
        "fathom": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of this source file: git's, or of a copy what ``FATHOM_COMMIT`` says."""
    here = Path(__file__)
    answer = None
    for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
        try:
            git = ["git", "-C", str(here.parent), *command]
            done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return os.environ.get("FATHOM_COMMIT")
        answer = done.stdout.strip()
    return answer
