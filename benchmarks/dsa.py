"""DSA's parts on one GPU at DeepSeek-V3.2's widths, against dense MLA through cuDNN.

    python benchmarks/dsa.py [--out DIR] [--parts cores,index,teach,layer]

128 heads, keys of 512 + 64 channels, 2048 tokens a query; 64 index heads of 128; one row, bfloat16,
median of the repeats. Selections are of two kinds: *random*, drawn for each query evenly over what
it may see, which is the worst for the caches; *smooth*, the same for 64 queries in a row.
TFLOP/s count the selected pairs alone: 2 products forward, 5 backward.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from records import limits, milliseconds, row, spread, write
from torch import Tensor

from fathom.attention import AttentionConfig
from fathom.layers.step import Step
from fathom.ops import attention, index_loss, index_topk, token_attention
from fathom.ops.indexer import quantise_rows
from fathom.ops.triton import indexer as indexer_kernel
from fathom.ops.triton import token_attention as kernel
from fathom.presets import preset

HEADS, LATENT, ROPE, TOPK = 128, 512, 64, 2048
INDEX_HEADS, INDEX_DIM = 64, 128
DIM = 7168
SCALE = 192**-0.5
CUDNN = {16384: (54.6, 406), 65536: (333, 279)}  # cudnn-frontend 1.32's DSA backward, an H100


def selection(length: int, together: int) -> Tensor:
    """int32 ``[length, TOPK]``: one token from each of TOPK equal parts of what is visible."""
    places = torch.arange(length, device="cuda")
    first = places // together * together  # of the queries that select alike
    draws = torch.rand(-(-length // together), TOPK, device="cuda")[places // together]
    borders = torch.arange(TOPK + 1, device="cuda") * (first + 1)[:, None] // TOPK
    chosen = (borders[:, :-1] + draws * borders.diff()).to(torch.int32)
    every = torch.arange(TOPK, device="cuda", dtype=torch.int32)
    early = every.where(every <= places[:, None], -1)
    return torch.where(first[:, None] < TOPK, early, chosen).contiguous()


def pairs(selected: Tensor) -> int:
    return int((selected >= 0).sum())


def timed(run: Callable[[], object], repeats: int = 4) -> tuple[float, float]:
    values = milliseconds(run, repeats=repeats, warmup=1)
    return statistics.median(values), spread(values)


def line(case: str, metric: str, unit: str, found: tuple[float, float], **peers: float) -> dict:
    made = row(case, metric, unit, found[0], peers, spread=found[1], higher_is_better=False)
    print(f"  {case:<14} {metric:<24} {found[0]:9.3f} {unit} {peers or ''}", flush=True)
    return made


def rate(case: str, metric: str, flops: float, milliseconds: float) -> dict:
    value = flops / milliseconds / 1e9
    print(f"  {case:<14} {metric:<24} {value:9.1f} TFLOP/s", flush=True)
    return row(case, metric, "TFLOP/s", value, {})


def dense(length: int) -> tuple[float, float]:
    """MLA expanded, forward: 128 heads, keys of 192, values of 128, causal."""
    q, k = (torch.randn(1, length, HEADS, 192, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    v = torch.randn(1, length, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        return timed(lambda: attention(q, k, v, scale=SCALE, causal=True), repeats=3)


def cores(length: int) -> list[dict]:
    """Attention over the selected tokens, forward and backward, and dense MLA's forward."""
    case, rows = f"dsa-{length // 1024}k", []
    dense_time = dense(length)
    q = torch.randn(length, HEADS, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(length, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    for kind, together in (("random", 1), ("smooth", 64)):
        selected = selection(length, together)
        rows += forward(case, kind, q, k, selected, dense_time[0])
        rows += backward(case, kind, q, k, selected)
    return rows


def forward(
    case: str, kind: str, q: Tensor, k: Tensor, selected: Tensor, dense_time: float
) -> list[dict]:
    with torch.no_grad():
        found = timed(
            lambda: token_attention(q[None], k[None], selected[None], value_dim=LATENT, scale=SCALE)
        )
    flops = 2 * HEADS * pairs(selected) * (2 * LATENT + ROPE)
    return [
        line(case, f"forward_{kind}", "ms", found, cudnn=dense_time),
        rate(case, f"forward_{kind}", flops, found[0]),
    ]


def backward(case: str, kind: str, q: Tensor, k: Tensor, selected: Tensor) -> list[dict]:
    out, lse = (t[0] for t in kernel.forward(q[None], k[None], selected[None], LATENT, SCALE))
    grad = torch.randn_like(out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = timed(
        lambda: kernel.backward(grad, q, k, selected, out, lse, SCALE),
        repeats=2,
    )
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    peers = {"cudnn-frontend": CUDNN[len(q)][0]} if len(q) in CUDNN else {}
    flops = 2 * HEADS * pairs(selected) * (3 * (LATENT + ROPE) + 2 * LATENT)
    return [
        line(case, f"backward_{kind}", "ms", found, **peers),
        rate(case, f"backward_{kind}", flops, found[0]),
        line(case, f"backward_memory_{kind}", "GiB", (extra, 0.0)),
    ]


def index(length: int) -> list[dict]:
    """Scores and top-k of every query; no scores of the whole length exist."""
    case = f"dsa-{length // 1024}k"
    q = torch.randn(1, length, INDEX_HEADS, INDEX_DIM, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, length, INDEX_DIM, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1, length, INDEX_HEADS, device="cuda")
    places = torch.arange(length, device="cuda")[None]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = timed(lambda: index_topk(q, k, weight, places, places * 0, topk=TOPK), repeats=2)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    (q8, q_scale), (k8, k_scale) = quantise_rows(q), quantise_rows(k)
    inputs = q8, k8, weight * q_scale, places, places * 0
    small = timed(lambda: index_topk(*inputs, topk=TOPK, k_scale_BS=k_scale), repeats=2)
    peers = {16384: 4.6 + 0.61, 65536: 75.4 + 7.8}  # cudnn-frontend 1.32, bf16: scores, then top-k
    given = {"cudnn-frontend": peers[length]} if length in peers else {}
    return [
        line(case, "index_topk", "ms", found, **given),
        line(case, "index_topk_fp8", "ms", small, **given),
        line(case, "index_topk_memory", "GiB", (extra, 0.0)),
        *select_alone(case, length),
    ]


def teach(length: int) -> list[dict]:
    """The indexer's loss on the selected tokens with its gradients: target, scores, backward."""
    case = f"dsa-{length // 1024}k"
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(1, length, INDEX_HEADS, INDEX_DIM, **bf16).requires_grad_()
    k = torch.randn(1, length, INDEX_DIM, **bf16)
    weight = torch.randn(1, length, INDEX_HEADS, device="cuda") / (INDEX_HEADS * INDEX_DIM) ** 0.5
    main_q = torch.randn(1, length, HEADS, LATENT + ROPE, **bf16)
    main_k = torch.randn(1, length, 1, LATENT + ROPE, **bf16)
    places = torch.arange(length, device="cuda")[None]
    selected = selection(length, 64)[None]

    with torch.no_grad():  # the attention's own forward gives it to the loss
        _, lse = token_attention(main_q, main_k[:, :, 0], selected, value_dim=LATENT, scale=SCALE)

    def loss() -> Tensor:
        main = main_q, main_k, places, places * 0
        known = {"selected_BTN": selected, "main_lse_BTH": lse}
        return index_loss(q, k, weight, *main, scale=SCALE, **known, impl="triton")

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = timed(loss, repeats=2)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    peers = {"cudnn-frontend": 12.0 + 7.8} if length == 16384 else {}
    return [
        line(case, "index_loss_smooth", "ms", found, **peers),
        line(case, "index_loss_memory", "GiB", (extra, 0.0)),
    ]


def select_alone(case: str, length: int) -> list[dict]:
    """The selection kernel on the last chunk's scores, beside ``torch.topk``, for all queries."""
    rows = min(length, indexer_kernel.WORKSPACE_BYTES // (4 * length))
    scores = torch.randn(rows, length, device="cuda")
    places = torch.full((rows,), length - 1, device="cuda", dtype=torch.int32)
    selected = torch.empty(rows, TOPK, device="cuda", dtype=torch.int32)

    def select() -> None:
        indexer_kernel.select(scores, places, places * 0, selected)

    ours, theirs = timed(select), timed(lambda: scores.topk(TOPK, sorted=False))
    return [
        line(case, f"select_{rows}_rows", "ms", ours, torch=theirs[0]),
    ]


def layer(length: int) -> list[dict]:
    """The whole attention layer, forward, projections and selection included, beside MLA's."""
    attention = preset("deepseek-v3.2").groups[0].attention
    small = replace(attention, index_fp8=True)
    mla = preset("deepseek-v3").groups[0].attention
    x = torch.randn(1, length, DIM, device="cuda", dtype=torch.bfloat16)
    ours, fp8, dense_time = (layer_time(cfg, x) for cfg in (attention, small, mla))
    case = f"dsa-layer-{length // 1024}k"
    return [
        line(case, "forward", "ms", ours, mla=dense_time[0]),
        line(case, "forward_fp8_index", "ms", fp8, mla=dense_time[0]),
    ]


@torch.no_grad()
def layer_time(cfg: AttentionConfig, x: Tensor) -> tuple[float, float]:
    with torch.device("cuda"):
        built = cfg.build(DIM).to(torch.bfloat16)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1)
    step = Step.full(x[..., 0])
    found = timed(lambda: built(x, step), repeats=2)
    torch.cuda.empty_cache()
    return found


PARTS = {  # what runs at which lengths
    "cores": (cores, (16384, 65536)),
    "index": (index, (16384, 65536)),
    "teach": (teach, (16384, 65536)),
    "layer": (layer, (4096, 8192, 16384, 32768, 65536)),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default=",".join(PARTS))
    names = parser.parse_known_args()[0].parts.split(",")
    torch.manual_seed(0)
    machine, rows = limits(), []
    for name in names:
        part, lengths = PARTS[name]
        for length in lengths:
            rows += part(length)
            torch.cuda.empty_cache()
        write("sparse_attention_dsa", rows, machine)  # so far: a cut loses only what comes after


if __name__ == "__main__":
    main()
