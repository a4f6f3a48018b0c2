"""The attention of NSA and MoBA against dense cuDNN: forward, and forward + backward, in ms.

    python benchmarks/sparse_attention.py [--out DIR] [--cases nsa-64k moba-512-64k] [--fla]

One sequence in bf16, 64 query heads of width 128 on random tensors, so that selections are random
too: neighbouring queries share no more than the forced blocks. NSA: 4 key heads, compression (mean
of 64 keys, stride 64), the choice of 16 blocks of 64, the selected branch and a window of 512; not
in it: projections and gates. MoBA: a key head for each query head, means, choice and attention.
Every branch has keys and values of its own. Dense: causal SDPA through cuDNN on the same shapes.
``--fla``: NSA of flash-linear-attention (fla-core 0.6.0) beside it, which has no window here and
one key and value for both its branches; the tuning of its kernels takes minutes.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from records import limits, milliseconds, row, spread, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fathom.ops import block_attention, range_attention, select_by_importance, select_by_mean
from fathom.ops.range_attention import range_attention_with_sums

HEADS, GROUPS, WIDTH, WINDOW, SELECTED = 64, 4, 128, 512, 16
SCALE = WIDTH**-0.5
OURS = {"impl": "triton"}
CASES = {  # tokens, block, blocks of a query; kind by the name
    "nsa-8k": (8_192, 64, SELECTED),
    "nsa-32k": (32_768, 64, SELECTED),
    "nsa-64k": (65_536, 64, SELECTED),
    "moba-512-64k": (65_536, 512, 2),
    "moba-128-64k": (65_536, 128, 8),
}


def leaves(length: int, *heads: int) -> list[Tensor]:
    shape = (1, length)
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(*shape, n, WIDTH, **options) for n in heads]


def means(x_BTGQ: Tensor, block: int) -> Tensor:
    return x_BTGQ.unflatten(1, (-1, block)).mean(2)


def nsa(length: int, block: int, blocks: int) -> tuple[dict[str, Callable[[], Tensor]], list]:
    """Each part as a function, and what wants gradients."""
    inputs = leaves(length, HEADS, *[GROUPS] * 6)
    q, k_cmp, v_cmp, k, v, k_win, v_win = inputs
    place = torch.arange(length, device="cuda", dtype=torch.int32)[None]
    zero, complete = torch.zeros_like(place), (place + 1) // block
    low = (place + 1 - WINDOW).clamp(min=0)
    sizes = {"cmp_block_size": block, "cmp_stride": block, "block_size": block}

    def select(lse: Tensor | None) -> Tensor:
        entries = means(k_cmp, block)
        bounds = (zero, complete, place, place)
        return select_by_importance(
            q, entries, *bounds, scale=SCALE, topk_blocks=blocks, lse_BTH=lse, **sizes, **OURS
        )

    def compressed() -> tuple[Tensor, Tensor | None]:
        entries = (means(k_cmp, block), means(v_cmp, block))
        return range_attention_with_sums(q, *entries, zero, complete, scale=SCALE, **OURS)

    lse = compressed()[1]
    starts = select(lse)

    def selected() -> Tensor:
        return block_attention(q, k, v, starts, place, block_size=block, scale=SCALE, **OURS)

    def window() -> Tensor:
        return range_attention(q, k_win, v_win, low, place + 1, scale=SCALE, **OURS)

    parts: dict[str, Callable[[], Tensor]] = {
        "select": lambda: select(lse),
        "select-alone": lambda: select(None),
        "compressed": lambda: compressed()[0],
        "selected": selected,
        "window": window,
    }

    def whole() -> Tensor:
        cmp, lse = compressed()
        slc = block_attention(q, k, v, select(lse), place, block_size=block, scale=SCALE, **OURS)
        return cmp + slc + window()

    return {"": whole} | {"-" + name: part for name, part in parts.items()}, inputs


def moba(length: int, block: int, blocks: int) -> tuple[dict[str, Callable[[], Tensor]], list]:
    inputs = leaves(length, HEADS, HEADS, HEADS)
    q, k, v = inputs
    place = torch.arange(length, device="cuda", dtype=torch.int32)[None]
    bounds = (torch.zeros_like(place), place // block, place, place)

    def select() -> Tensor:
        return select_by_mean(
            q, means(k, block), *bounds, block_size=block, topk_blocks=blocks, **OURS
        )

    starts = select()

    def selected() -> Tensor:
        return block_attention(q, k, v, starts, place, block_size=block, scale=SCALE, **OURS)

    def whole() -> Tensor:
        return block_attention(q, k, v, select(), place, block_size=block, scale=SCALE, **OURS)

    return {"": whole, "-select": select, "-selected": selected}, inputs


def dense(length: int, groups: int) -> tuple[Callable[[], Tensor], list]:
    inputs = leaves(length, HEADS, groups, groups)

    def run() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in inputs)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=groups != HEADS, scale=SCALE
            )

    return run, inputs


def fla(length: int, block: int, blocks: int) -> tuple[Callable[[], Tensor], list]:
    from fla.ops.nsa import parallel_nsa

    inputs = leaves(length, HEADS, GROUPS, GROUPS)
    gate = torch.ones(1, length, HEADS, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return parallel_nsa(
            *inputs, g_cmp=gate, g_slc=gate, block_counts=blocks, block_size=block, scale=SCALE
        )

    return run, inputs


def times(run: Callable[[], Tensor], inputs: list, repeats: int) -> dict[str, list[float]]:
    """Forward alone and forward + backward."""
    with torch.no_grad():
        found = {"forward": milliseconds(run, repeats=repeats, warmup=2)}
        out = run()
    if not out.is_floating_point():
        return found
    grad = torch.randn_like(out)
    del out

    def both() -> None:
        torch.autograd.grad(run(), inputs, grad, allow_unused=True)

    return found | {"forward+backward": milliseconds(both, repeats=repeats, warmup=2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fla", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows, machine, peers = [], limits(), {}
    for name in arguments.cases:
        length, block, blocks = CASES[name]
        is_nsa = name.startswith("nsa")
        shape = (length, GROUPS if is_nsa else HEADS)
        if shape not in peers:
            peers[shape] = {"cudnn": times(*dense(*shape), arguments.repeats)}
            if is_nsa and arguments.fla:
                peers[shape]["fla"] = times(*fla(length, block, blocks), arguments.repeats)
        parts, inputs = (nsa if is_nsa else moba)(length, block, blocks)
        for part, run in parts.items():
            torch.cuda.reset_peak_memory_stats()
            for metric, values in times(run, inputs, arguments.repeats).items():
                against = {} if part else peers[shape]
                against = {who: statistics.median(found[metric]) for who, found in against.items()}
                rows.append(
                    row(
                        name + part,
                        metric,
                        "ms",
                        statistics.median(values),
                        against,
                        spread=spread(values),
                        higher_is_better=False,
                    )
                )
                print(name + part, metric, statistics.median(values), against, flush=True)
            gb = torch.cuda.max_memory_allocated() / 1e9
            rows.append(row(name + part, "peak_memory", "GB", gb, {}, higher_is_better=False))
        del parts, inputs, run
    write("sparse_attention", rows, machine, selections="random")


if __name__ == "__main__":
    main()
