"""Compile Triton kernels for Hopper (sm_90) on a machine without a GPU, and read what they need.

    arguments = {"x": "*bf16", "n": "i32", "WIDTH": 64}
    [built] = build(Source("fathom.ops.triton.norm:_forward", arguments, {"num_warps": 4}))
    assert not built.spilled

A process of its own compiles: where tests interpret kernels (``TRITON_INTERPRET``), it must not.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

SHARED_LIMIT = 227 * 1024  # bytes a block may have on Hopper


@dataclass(frozen=True)
class Source:
    """A kernel and what it is compiled for.

    ``arguments``: by name a type ("*bf16", "i32", "fp32"; "i32:16" is a multiple of 16), or the
    value of a constexpr; a tuple has a type for each of its parts. Pointers are taken to be aligned
    to 16 bytes, as those of tensors are.
    """

    kernel: str  # "package.module:function"
    arguments: Mapping[str, str | int | float | bool | tuple[str, ...] | None]
    options: Mapping[str, int] = field(default_factory=dict)  # num_warps, num_stages, maxnreg


@dataclass(frozen=True)
class Built:
    """What one compiled kernel needs."""

    kernel: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack: 0 if all fits in registers
    shared: int  # bytes of a block
    wgmma: bool  # uses Hopper's matrix instructions; False: the older ones or none
    widest: int  # bytes that a thread loads from global memory at once


def build(*sources: Source) -> list[Built]:
    """Compile all of them in one process.

    Raises:
        AssertionError: with the compiler's message, if one does not compile.
    """
    paths = os.pathsep.join([p for p in sys.path if p])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(s) for s in sources]),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Built(**b) for b in json.loads(done.stdout.splitlines()[-1])]


def _compile(kernel: str, arguments: Mapping, options: Mapping) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.split(":")
    function = getattr(import_module(module), name)
    function = getattr(function, "fn", function) if hasattr(function, "configs") else function
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.arg_names):
        value = arguments[parameter]
        constexpr = function.params[i].is_constexpr or not isinstance(value, str | list)
        signature[parameter] = "constexpr" if constexpr else _type(value)
        if constexpr:
            constants[(i,)] = value
        elif isinstance(value, list):
            continue
        elif value.startswith("*") or value.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
    registers, stack = _resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return Built(kernel, registers, stack, built.metadata.shared, "wgmma" in ptx, _widest(ptx))


def _type(value: str | list[str]) -> str | tuple[str, ...]:
    return value.removesuffix(":16") if isinstance(value, str) else tuple(value)


def _widest(ptx: str) -> int:
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(parts or 1) * int(bits) // 8 for parts, bits in loads), default=0)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.findall(rf"{what}:(\d+)", text) for what in ("REG", "STACK"))
    return int(registers[-1]), int(stack[-1])


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(_compile(**s)) for s in json.load(sys.stdin)]))
