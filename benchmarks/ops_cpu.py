"""Which way of computing each op is fastest on one CPU thread: the choices made in ``fathom.ops``.

    python benchmarks/ops_cpu.py [--out DIR]

Forward and backward in float32 at the shapes of the demo (16 x 256 tokens). The ways of a case take
turns in a random order. A figure is the median CPU time of the thread, which other programs disturb
little; a ratio is the median over the turns of the best other way over ours.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from records import limits, row, spread, write
from torch import Tensor
from torch.nn import functional as F

from fathom.ops import (
    attention,
    combine,
    gather,
    grouped_mm,
    linear_cross_entropy,
    rms_norm,
    rotate,
    sort_by_expert,
)
from fathom.ops.attention import few_queries
from fathom.ops.norm import rms_norm_reference

TURNS = 24
Way = Callable[..., Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def trained(way: Way, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Forward and backward of one way."""
    leaves = [t for t in inputs if t.requires_grad]

    def run() -> object:
        out = way(*inputs)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def case(name: str, inputs: Sequence[Tensor], ours: Way, **peers: Way) -> dict[str, Any]:
    """All ways in turns: milliseconds of CPU time."""
    runs = {what: trained(way, inputs) for what, way in {"ours": ours, **peers}.items()}
    times: dict[str, list[float]] = {what: [] for what in runs}
    shuffled = random.Random(0)
    for turn in range(TURNS + 2):
        for what in shuffled.sample(
            list(runs), len(runs)
        ):  # one warms or cools the memory of the next
            start = time.thread_time()
            runs[what]()
            if turn >= 2:
                times[what].append(1e3 * (time.thread_time() - start))
    medians = {what: statistics.median(values) for what, values in times.items()}
    mine = medians.pop("ours")
    best = times[min(medians, key=medians.__getitem__)]
    ratio = statistics.median(b / a for a, b in zip(times["ours"], best, strict=True))
    noise = spread(sorted(times["ours"])[2:-2])
    line = row(name, "step_time", "ms", mine, medians, spread=noise, higher_is_better=False)
    return line | {"ratio_to_best_peer": ratio}


def norms() -> list[dict[str, Any]]:
    return [
        case(
            f"norm-d{width}",
            (randn(16, 256, width), randn(width)),
            lambda x, w: rms_norm(x, w, 1e-6),
            definition=lambda x, w: rms_norm_reference(x, w, 1e-6),
            torch=lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        )
        for width in (64, 128, 256)
    ]


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def ropes() -> list[dict[str, Any]]:
    angle = torch.rand(16, 256, 1, 16)
    inputs = (randn(16, 256, 4, 32), angle.cos(), angle.sin())
    return [case("rope-h4-d32", inputs, rotate, halves=halves)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    shared = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared, **kwargs).transpose(1, 2)


def attentions() -> list[dict[str, Any]]:
    shapes = {
        "attention-mha-32": (4, 32, 32),
        "attention-mqa-32": (1, 32, 32),
        "attention-mla-24-16": (4, 24, 16),
        "attention-mla-48-32": (4, 48, 32),
    }
    rows = [
        case(
            name,
            (
                randn(16, 256, 4, width),
                randn(16, 256, groups, width),
                randn(16, 256, groups, values),
            ),
            lambda q, k, v: attention(q, k, v, scale=q.shape[-1] ** -0.5, causal=True),
            sdpa=lambda q, k, v: sdpa(q, k, v, is_causal=True),
            definition=lambda q, k, v: attention(
                q, k, v, scale=q.shape[-1] ** -0.5, causal=True, impl="reference"
            ),
        )
        for name, (groups, width, values) in shapes.items()
    ]
    mask = torch.ones(16, 1, 256, 256, dtype=torch.bool).tril()
    inputs = tuple(randn(16, 256, 4, 32) for _ in range(3))
    packed = case(
        "attention-mha-32-mask",
        inputs,
        lambda q, k, v: attention(q, k, v, scale=32**-0.5, mask=mask),
        sdpa=lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
    )
    latent = (randn(16, 1, 8, 80), randn(16, 1024, 1, 80), randn(16, 1024, 1, 64))
    decode = case(
        "attention-mla-decode",
        latent,
        lambda q, k, v: few_queries(q, k, v, 0.1, None),
        sdpa=lambda q, k, v: sdpa(q, k, v, scale=0.1),
    )
    return [*rows, packed, decode]


def experts() -> list[dict[str, Any]]:
    rows = []
    for name, n_experts, top_k, inner in (("coarse", 8, 2, 128), ("fine-grained", 64, 6, 32)):
        ids = torch.rand(4096, n_experts).topk(top_k, dim=-1).indices
        sorted_ = sort_by_expert(ids, n_experts)
        x, w = randn(4096 * top_k, 128), randn(n_experts, 2 * inner, 128)
        rows.append(
            case(
                f"grouped_mm-{name}",
                (x, w),
                lambda x, w, ends=sorted_.ends: grouped_mm(x, w.mT, ends),
                loop=lambda x, w, ends=sorted_.ends: grouped_mm(x, w.mT, ends, impl="reference"),
                dense=lambda x, w: x @ w[0].T,
            )
        )
        gates = torch.rand(4096, top_k, requires_grad=True)
        rows.append(
            case(
                f"permute-{name}",
                (randn(4096, 128), gates),
                lambda x, g, p=sorted_, k=top_k: combine(gather(x, p, k), g, p),
                indexing=lambda x, g, p=sorted_, k=top_k: index_add(x, g, p.order, k),
            )
        )
    return rows


def index_add(x: Tensor, gates: Tensor, order: Tensor, top_k: int) -> Tensor:
    token = order // top_k
    rows = x.index_select(0, token) * gates.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def losses() -> list[dict[str, Any]]:
    rows = []
    for vocab in (1024, 4096):
        targets = torch.randint(0, vocab, (4096,))
        rows.append(
            case(
                f"loss-v{vocab}",
                (randn(4096, 128), randn(vocab, 128)),
                lambda x, w, t=targets: linear_cross_entropy(x, w, t),
                whole=lambda x, w, t=targets: F.cross_entropy(x @ w.T, t, reduction="sum"),
            )
        )
    return rows


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [*norms(), *ropes(), *attentions(), *experts(), *losses()]
    write("ops_cpu", rows, limits())


if __name__ == "__main__":
    main()
