"""The compile check tells kernels that fit a Hopper thread's registers from those that do not."""

import pytest
import triton
import triton.language as tl

from ops.hopper import Source, build


@triton.jit
def product(a, b, out, n, SIZE: tl.constexpr):
    cells = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + cells, tl.dot(tl.load(a + cells), tl.load(b + cells)) + n)


def test_spills_shared_memory_and_matrix_instructions_are_read_from_the_compiled_kernel():
    arguments = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32", "SIZE": 128}
    sources = [Source("ops.test_hopper:product", arguments, {"num_warps": n}) for n in (4, 1)]
    fits, spills = build(*sources)
    assert (fits.spilled, fits.shared, fits.wgmma) == (0, 2 * 128 * 128 * 2, True)
    assert (spills.spilled > 0, spills.wgmma) == (True, False)


def test_a_kernel_that_does_not_compile_is_reported_with_the_compilers_words():
    with pytest.raises(AssertionError, match="no_such_kernel"):
        build(Source("ops.test_hopper:no_such_kernel", {}))
