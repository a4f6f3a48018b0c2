"""What choosing experts costs: the router's share of an expert layer's time, by experts.

    python benchmarks/router.py [--out DIR]

32,768 tokens of 2,048 in bf16, 8 of E experts of 768 (Qwen3-30B's widths), sigmoid scores,
normalised. "router" is from the tokens to ids and gates and, backward, from the gates' gradient to
the tokens' and the weight's, compiled as it is in a model; "sort" brings the choices into the order
of the experts. The peer "torch" is a float32 product and ``topk``, compiled; a stable argsort and
``searchsorted``. Their shares are of the whole layer, forward and backward. All run as CUDA graphs,
so that what is timed is the device's work and not the launching.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from moe_layer import graphed, measure, our_layer, routed
from records import as_graph, limits, milliseconds, row, spread, write
from torch import Tensor
from torch.nn.functional import linear

from fathom.ops import sort_by_expert

TOKENS, DIM, INNER, TOP_K = 32768, 2048, 768, 8
EXPERTS = (64, 128, 256, 512)


def both_ways(choose: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward and backward of gates as a function of tokens and weight."""
    compiled = torch.compile(choose, fullgraph=True)
    grad = torch.randn(TOKENS, TOP_K, device="cuda")
    return lambda: torch.autograd.grad(compiled(x), (x, weight), grad)


def plain_gates(x: Tensor, weight: Tensor) -> Tensor:
    scores = linear(x.float(), weight.float()).sigmoid().topk(TOP_K, dim=-1).values
    return scores / scores.sum(-1, keepdim=True)


def plain_sort(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    experts = torch.arange(n_experts, device=ids.device)
    return order, torch.searchsorted(flat[order], experts, right=True, out_int32=True)


def rows_of(n_experts: int) -> list[dict[str, object]]:
    case = (TOKENS, DIM, INNER, n_experts, TOP_K)
    torch.compiler.reset()
    layer = our_layer(case)
    whole = measure(lambda: graphed(layer, routed(layer), TOKENS))["ms"]
    x = torch.randn(TOKENS, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = layer.router.weight
    ids = layer.router(x).expert_ids_NK
    runs = {
        ("router", "ours"): both_ways(lambda x: layer.router(x).gates_NK, x, weight),
        ("router", "torch"): both_ways(lambda x: plain_gates(x, weight), x, weight),
        ("sort", "ours"): lambda: sort_by_expert(ids, n_experts),
        ("sort", "torch"): lambda: plain_sort(ids, n_experts),
    }
    times = {name: milliseconds(as_graph(run), repeats=10) for name, run in runs.items()}
    found = {name: statistics.median(values) for name, values in times.items()}
    lines = []
    for part in ("router", "sort"):
        mine, theirs = found[part, "ours"], {"torch": found[part, "torch"]}
        wide = spread(times[part, "ours"])
        name = f"e{n_experts}"
        lines.append(row(name, part, "ms", mine, theirs, spread=wide, higher_is_better=False))
        share = 100 * mine / whole
        lines.append(row(name, f"{part}_share", "% of the layer", share, {}))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.parse_args()
    rows, machine = [], limits()
    for n_experts in EXPERTS:
        rows += rows_of(n_experts)
        write("router", rows, machine)  # as far as it got


if __name__ == "__main__":
    main()
