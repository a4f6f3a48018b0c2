"""The kernels of a training step compile for Hopper with the sizes they are launched with."""

from fathom.ops.triton import cross_entropy, permute, swiglu
from ops.hopper import SHARED_LIMIT, Source, build

HERE = "fathom.ops.triton."


def sorting():
    types = dict.fromkeys(("pairs", "experts", "tiles"), "i32") | {"BLOCK_E": 32}
    types |= {"ids_P": "*i64", "counts_ET": "*i32", "BLOCK": permute.SORT_BLOCK}
    outputs = dict.fromkeys(("order_P", "inverse_P", "counts_E"), "*i64")
    outputs |= {"ends_ET": "*i32", "ends_E": "*i32", "PART": 32}
    yield Source(HERE + "permute:_count", types)
    yield Source(HERE + "permute:_place", types | outputs, {"num_warps": 8})


def gathering():
    types = {"rows": "i32", "width": "i32:16", "TOP_K": 8, "BLOCK": 1024}
    one = {"x_ND": "*bf16", "rows_PD": "*bf16", "inverse_P": "*i64"}
    other = {"y_PD": "*bf16", "out_ND": "*bf16", "rows_NK": "*i64"}
    yield Source(HERE + "permute:_gather", types | one)
    yield Source(HERE + "permute:_gather_sum", types | other)


def activating():
    sizes = {"rows": "i32", "width": "i32:16", "ROWS": swiglu.ROWS, "COLUMNS": swiglu.COLUMNS}
    types = sizes | {"h_P2I": "*bf16", "gates_P": "*fp32", "order_P": "*i64"}
    yield Source(HERE + "swiglu:_forward", types | {"a_PI": "*bf16"})
    outputs = {"da_PI": "*bf16", "dh_P2I": "*bf16", "dgates_P": "*fp32"}
    yield Source(HERE + "swiglu:_backward", types | outputs)


def routing():
    types = {"scores_NE": "*fp32", "ids_NK": "*i64"}
    types |= dict.fromkeys(("tokens", "top_k", "groups", "size", "kept"), "i32")
    for n, groups, size in ((16, 1, 64), (4, 8, 32), (1, 1, 1024)):
        shape = {"TOP_TWO": groups > 1, "TOKENS": n, "GROUPS": groups, "SIZE": size}
        yield Source(HERE + "router:_best_experts", types | shape)


def losing():
    types = {"logits_MV": "*bf16", "targets_M": "*i64", "losses_M": "*fp32"}
    types |= {"width": "i32:16", "ignore": "i32", "SLOPES": True, "BLOCK": cross_entropy.BLOCK}
    yield Source(HERE + "cross_entropy:_losses_and_slopes", types, {"num_warps": 8})


def test_nothing_spills_and_shared_memory_suffices():
    built = build(
        *sorting(),
        *gathering(),
        *activating(),
        *routing(),
        *losing(),
    )
    for kernel in built:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_LIMIT, kernel
