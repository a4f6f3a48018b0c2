"""Linear layer and cross-entropy over a large vocabulary: time, memory, error of the gradients.

    python benchmarks/loss.py [--out DIR] [--cases v102400]

Forward and backward in bf16. "torch" is PyTorch's own over whole logits, "torch-compiled" the same
in chunks of 4,096 rows whose gradients are computed at once, each chunk compiled. quack (its exact
form), Liger and cut-cross-entropy (its exact form, compiled) join where they can be imported.
"""

import argparse
import gc
import importlib.util
import statistics
from collections.abc import Callable

import torch
from records import limits, milliseconds, row, spread, write
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fathom.ops import linear_cross_entropy

CASES = {
    "v102400": (16384, 2048, 102400),
    "v32768": (16384, 1024, 32768),
    "v8192": (32768, 384, 8192),
}
CHUNK = 4096
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(linear(x, w).float(), targets, reduction="sum")


class Chunked(torch.autograd.Function):
    """Gradients of a chunk while its logits are there, as ours; each chunk compiled."""

    @staticmethod
    def forward(ctx, x, w, targets):
        dx, dw, total = torch.empty_like(x), torch.zeros_like(w), x.new_zeros((), dtype=torch.float)
        for a in range(0, len(x), CHUNK):
            loss, slopes = chunk(linear(x[a : a + CHUNK], w), targets[a : a + CHUNK])
            total += loss
            torch.mm(slopes, w, out=dx[a : a + CHUNK])
            dw.addmm_(slopes.T, x[a : a + CHUNK])
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None


@torch.compile
def chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    loss = -log_p.gather(1, targets[:, None]).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    return loss, (log_p.exp() - (columns == targets[:, None]).float()).to(logits.dtype)


def quack(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    exact = {"use_scaled_exp": False, "tuned": False}
    return chunked_linear_cross_entropy(x, w, targets, chunk_size=CHUNK, **exact) * len(x)


def liger(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(w, x, targets) * len(x)


def cce(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(x, w, targets, impl="torch_compile") * len(x)


def others() -> dict[str, Loss]:
    """The peers that can be imported."""
    known = {"quack": quack, "liger_kernel": liger, "cut_cross_entropy": cce}
    return {way.__name__: way for name, way in known.items() if importlib.util.find_spec(name)}


def inputs(case: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dim, vocabulary = case
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(vocabulary, dim, device="cuda").mul(0.02).bfloat16().requires_grad_()
    return x, w, torch.randint(0, vocabulary, (tokens,), device="cuda")


def measure(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    x, w, targets = tensors

    def run() -> None:
        x.grad = w.grad = None
        loss(x, w, targets).mul(1 / len(x)).backward()

    run()
    held = torch.cuda.memory_allocated() - x.grad.nbytes - w.grad.nbytes
    torch.cuda.reset_peak_memory_stats()
    times = milliseconds(run, repeats=8, warmup=2)
    return {
        "ms": statistics.median(times),
        "spread": spread(times),
        "gb": (torch.cuda.max_memory_allocated() - held) / 1e9,
    }


def error(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of the weight's gradient against float32 products of the same numbers, on 1,024 tokens."""
    x, w, targets = (t.detach()[:1024] if i != 1 else t.detach() for i, t in enumerate(tensors))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = w.to(dtype).requires_grad_()
        run = loss if dtype == torch.bfloat16 else whole
        found.append(torch.autograd.grad(run(x.to(dtype), leaf, targets), leaf)[0].float())
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--out")
    rows, machine = [], limits()
    for name in parser.parse_args().cases:
        tensors = inputs(CASES[name])
        ways: dict[str, Loss] = {
            "ours": linear_cross_entropy,
            "torch-compiled": lambda *t: Chunked.apply(*t),
            "torch": whole,
            "ours-without-kernel": lambda x, w, t: linear_cross_entropy(x, w, t, impl="torch"),
            **others(),
        }
        found = {}
        for who, way in list(ways.items()):
            try:
                found[who] = measure(way, tensors)
            except Exception as error:
                if who == "ours":
                    raise
                print(f"{name} {who} did not run: {str(error)[:400]}", flush=True)
                del ways[who]
                continue
            print(name, who, found[who], flush=True)
        for metric, unit in (("ms", "ms"), ("gb", "GB")):
            values = {who: one[metric] for who, one in found.items()}
            mine = values.pop("ours")
            wide = found["ours"]["spread"] if metric == "ms" else None
            rows.append(row(name, metric, unit, mine, values, spread=wide, higher_is_better=False))
        wrong = {who: error(way, tensors) for who, way in ways.items()}
        mine = wrong.pop("ours")
        rows.append(row(name, "dw_error", "relative", mine, wrong, higher_is_better=False))
    write("loss", rows, machine)


if __name__ == "__main__":
    main()
