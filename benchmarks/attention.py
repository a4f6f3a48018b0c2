"""Dense attention: ours, and what else there is, from 1,024 to 65,536 tokens, documents packed too.

    python benchmarks/attention.py [--cases mla-4k packed-8x4k] [--sweep] [--out DIR]

16 heads in bf16, queries and keys of 192 and values of 128 (MLA) or all of 128, causal; forward
alone, and with backward. FLOPs are those of the visible pairs: ``2 (Q + V)`` a pair and head
forward, ``2 (3 Q + 2 V)`` backward. Documents are of uneven lengths and a document sees itself
alone. What a mask needs (a bias, a block mask) is made before the clock starts, as a step makes it
once for all layers. FlexAttention, compiled anew for every shape, joins for documents; PyTorch's
flash attention, its values padded to the width of the keys, without them; flash-attn-4 where it can
be imported. ``--sweep`` takes 65,536 tokens in rows of every length instead.
"""

import argparse
import gc
import importlib.util
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from records import limits, milliseconds, row, spread, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from fathom.attention.base import attend_visible
from fathom.layers.step import Step

HEADS = 16
SHARES = (0.25, 0.2, 0.15, 0.125, 0.1, 0.075, 0.06, 0.04)  # of the tokens, by document
CASES = {  # widths of queries and values, rows, tokens a row, whether it is packed documents
    "packed-8x4k": (192, 128, 1, 32768, True),
    "packed-8x1k": (192, 128, 1, 8192, True),
    "mla-4k": (192, 128, 2, 4096, False),
    "mla-16k": (192, 128, 2, 16384, False),
    "mha-4k": (128, 128, 2, 4096, False),
}
SWEEP = {f"t{n}": (192, 128, 65536 // n, n, False) for n in (1024 * 2**i for i in range(7))}
Case = tuple[int, int, int, int, bool]
Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, T, H, Q or V] each, and its result


def borders(case: Case) -> list[int]:
    """Where the documents of the one row start, and its end."""
    total = case[3]
    lengths = [int(total * share) for share in SHARES[:-1]]
    ends = torch.tensor([*lengths, total - sum(lengths)]).cumsum(0).tolist()
    return [0, *ends]


def pairs(case: Case) -> float:
    """Visible pairs of a query and a key, in all rows."""
    _, _, batch, length, packed = case
    lengths = [b - a for a, b in pairwise(borders(case))] if packed else [length] * batch
    return sum(n * (n + 1) / 2 for n in lengths)


def ours(case: Case) -> Core:
    """What the layers call."""
    width, _, batch, length, packed = case
    tokens, cu_seqlens = torch.zeros(batch, length, device="cuda", dtype=torch.int64), None
    if packed:
        cu_seqlens = torch.tensor(borders(case), device="cuda", dtype=torch.int32)
    step = Step.full(tokens, cu_seqlens)
    return lambda q, k, v: attend_visible(q, k, v, step, None, scale=width**-0.5)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    return out.transpose(1, 2)


def cudnn(case: Case) -> Core:
    """One call, or one a document."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not case[4]:
            return by_sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION, None)
        documents = [
            by_sdpa(q[:, a:b], k[:, a:b], v[:, a:b], SDPBackend.CUDNN_ATTENTION, None)
            for a, b in pairwise(borders(case))
        ]
        return torch.cat(documents, dim=1)

    return run


def flash(case: Case) -> Core:
    """PyTorch's own, which wants values as wide as keys; it takes no documents."""
    wider = case[0] - case[1]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = by_sdpa(q, k, pad(v, (0, wider)), SDPBackend.FLASH_ATTENTION, None)
        return out[..., : case[1]]

    return run


def memory_efficient(case: Case) -> Core:
    bias = None
    if case[4]:
        seen = visible(case)(0, 0, *(torch.arange(case[3], device="cuda")[s] for s in SIDES))
        bias = torch.where(seen, 0.0, float("-inf")).bfloat16()[None, None]
    return lambda q, k, v: by_sdpa(q, k, v, SDPBackend.EFFICIENT_ATTENTION, bias)


SIDES = ((slice(None), None), (None, slice(None)))  # queries down, keys across


def visible(case: Case) -> Callable[..., Tensor]:
    """``visible(batch, head, query, key)``, of places in the row."""
    if not case[4]:
        return lambda b, h, q, k: q >= k
    ends = torch.tensor(borders(case)[1:], device="cuda")
    document = torch.searchsorted(ends, torch.arange(case[3], device="cuda"), right=True)
    return lambda b, h, q, k: (document[q] == document[k]) & (q >= k)


def flex(case: Case) -> Core:
    length = case[3]
    blocks = create_block_mask(visible(case), None, None, length, length)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return run


def flash_attn_4(case: Case) -> Core:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if not case[4]:
        return lambda q, k, v: first(flash_attn_func(q, k, v, causal=True))
    at = borders(case)
    ends, longest = (
        torch.tensor(at, device="cuda", dtype=torch.int32),
        max(b - a for a, b in pairwise(at)),
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(
            *(t.flatten(0, 1) for t in (q, k, v)),
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        return first(out)[None]

    return run


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def ways(case: Case, *, sweep: bool) -> dict[str, Callable[[Case], Core]]:
    found = {"ours": ours, "cudnn": cudnn}
    found |= {"flex": flex} if case[4] else {"flash": flash}
    if not sweep:
        found["efficient"] = memory_efficient
    if importlib.util.find_spec("flash_attn"):
        found["flash-attn-4"] = flash_attn_4
    return found


def measure(way: Callable[[Case], Core], case: Case, exact: Tensor | None) -> dict[str, object]:
    """TFLOP/s, the spread, and the result, which must be that of the others."""
    width, value_width, batch, length, _ = case
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    q, k, v, grad = (
        torch.randn(batch, length, HEADS, w, **shape)
        for w in (width, width, value_width, value_width)
    )
    core = way(case)
    out = core(q, k, v)
    if exact is not None:
        error = ((out - exact).norm() / exact.norm()).item()
        assert error < 0.02, f"off by {error}"
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return core(q, k, v)

    def both() -> None:
        torch.autograd.grad(core(q, k, v), leaves, grad)

    work = 2 * pairs(case) * HEADS / 1e9
    times = [milliseconds(run, repeats=6, warmup=2) for run in (forward, both)]
    each = (width + value_width, 4 * width + 3 * value_width)
    return {
        "fwd": work * each[0] / statistics.median(times[0]),
        "fwd_bwd": work * each[1] / statistics.median(times[1]),
        "spread": spread(times[1]),
        "out": out.detach(),
    }


def rows_of(name: str, case: Case, *, sweep: bool) -> list[dict[str, object]]:
    found, exact = {}, None
    for who, way in ways(case, sweep=sweep).items():
        try:
            one = measure(way, case, exact)
        except (RuntimeError, AssertionError, ImportError, TypeError, ValueError) as error:
            if who == "ours":
                raise
            print(f"{name} {who} did not run: {str(error)[:200]}", flush=True)
            continue
        exact = one.pop("out") if exact is None else exact
        one.pop("out", None)
        found[who] = one
        print(name, who, one, flush=True)
    lines = []
    for metric in ("fwd", "fwd_bwd"):
        values = {who: one[metric] for who, one in found.items()}
        mine, wide = values.pop("ours"), found["ours"]["spread"]
        lines.append(row(name, metric, "TFLOP/s", mine, values, spread=wide))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    cases = SWEEP if arguments.sweep else {name: CASES[name] for name in arguments.cases}
    rows, machine = [], limits()
    for name, case in cases.items():
        rows += rows_of(name, case, sweep=arguments.sweep)
        benchmark = "attention_scaling" if arguments.sweep else "attention"
        write(benchmark, rows, machine)  # as far as it got


if __name__ == "__main__":
    main()
