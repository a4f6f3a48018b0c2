"""One token behind 131,072 cached ones: time and bytes of a whole attention layer, by kind.

    python benchmarks/sparse_decode.py [--out DIR] [--batches 1 8 32]

bfloat16, model width 2048; 64 query heads of 128 for 4 key heads (full, NSA, MoBA), 128 absorbed
heads (MLA, DSA with 2048 tokens, index keys in bfloat16). The cache holds random numbers, so that
selections are random. A step is replayed from a CUDA graph: no launch is waited for.

``read``: bytes that came from memory, which Nsight Compute counts in a second process, beside the
formula: what of the cache the step must read once, and the layer's weights.
"""

import argparse
import csv
import io
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from records import limits, milliseconds, row, spread, write

from fathom.attention import AttentionConfig
from fathom.attention.dsa import DSAConfig
from fathom.attention.mha import MHAConfig
from fathom.attention.mla import MLAConfig
from fathom.attention.moba import MoBAConfig
from fathom.attention.nsa import NSAConfig
from fathom.layers.cache import Cache, Ring
from fathom.layers.position import RopeConfig
from fathom.layers.step import Step

CACHED, DIM = 131_072, 2048
GROUPS, WIDTH = 4, 128
ROPE = RopeConfig(theta=10_000.0)
HEADS = {"n_heads": 64, "n_kv_heads": GROUPS, "head_dim": WIDTH, "position": ROPE}
LATENT, ROTATED, INDEX, TOPK = 512, 64, 128, 2048
MLA = MLAConfig(
    n_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=LATENT,
    qk_nope_head_dim=128,
    qk_rope_head_dim=ROTATED,
    v_head_dim=128,
    position=ROPE,
    absorb="always",
)
KV = 2 * GROUPS * WIDTH * 2  # bytes of a token's keys and values
CASES: dict[str, tuple[AttentionConfig, float]] = {  # and the bytes of a row's cache that it reads
    "full": (MHAConfig(**HEADS), KV * CACHED),
    "nsa": (NSAConfig(**HEADS), KV * (CACHED / 16 + 16 * 64 + 512)),
    "moba": (
        MoBAConfig(**HEADS, block_size=512, topk_blocks=8),
        KV / 2 * CACHED / 512 + KV * 8 * 512 * 16,  # each of a group's 16 heads selects by itself
    ),
    "mla": (MLA, 2 * (LATENT + ROTATED) * CACHED),
    "dsa": (
        DSAConfig.beside(MLA, index_n_heads=64, index_head_dim=INDEX, index_topk=TOPK),
        2 * (LATENT + ROTATED) * TOPK + 2 * INDEX * CACHED,
    ),
}


@torch.no_grad()
def step(cfg: AttentionConfig, batch: int) -> Callable[[], object]:
    """The layer's forward for the next token of every row."""
    with torch.device("cuda"):
        layer = cfg.build(DIM).to(torch.bfloat16)
    for parameter in layer.parameters():
        parameter.normal_(0, 0.02)
    cache = Cache(
        [cfg.streams()], batch_size=batch, capacity=CACHED + 8, device="cuda", dtype=torch.bfloat16
    )
    cache.length = CACHED
    for store in cache.layers[0].stores.values():
        store.buffer.copy_(torch.randn(store.buffer.shape[1:], device="cuda"))
        if isinstance(store, Ring):
            newest = torch.arange(CACHED - store.window, CACHED, device="cuda")
            store.slot_positions[:, newest % store.window] = newest
    x = torch.randn(batch, 1, DIM, device="cuda", dtype=torch.bfloat16)
    tokens = torch.zeros(batch, 1, device="cuda", dtype=torch.int64)

    @torch.no_grad()
    def run() -> object:
        return layer(x, Step.cached(tokens, cache).at(cache.layers[0]))

    return run


def replayed(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def weights(cfg: AttentionConfig) -> int:
    return 2 * cfg.num_params(DIM)


def once(batches: list[int]) -> None:
    """What Nsight Compute watches: a step of each case, each behind a kernel that waits."""
    for cfg, _ in CASES.values():
        for batch in batches:
            run = step(cfg, batch)
            run()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            del run
            torch.cuda.empty_cache()


def counted(batches: list[int]) -> dict[tuple[str, int], float]:
    """Bytes read from memory by case and batch; nothing without Nsight Compute."""
    if not shutil.which("ncu"):
        return {}
    watch = ["ncu", "--profile-from-start", "off", "--csv", "--page", "raw", "--clock-control"]
    watch += ["none", "--metrics", "dram__bytes_read.sum", "--print-units", "base"]
    command = [*watch, sys.executable, __file__, "--once", "--batches", *map(str, batches)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        sys.stderr.write(done.stdout[-500:] + done.stderr[-500:])
        return {}
    cases = [(name, batch) for name in CASES for batch in batches]
    found, at = dict.fromkeys(cases, 0.0), -1
    for kernel in csv.DictReader(io.StringIO("\n".join(lines))):
        if not kernel["ID"]:
            continue  # the line of units
        if "spin" in kernel["Kernel Name"]:
            at += 1
        else:
            found[cases[at]] += float(kernel["dram__bytes_read.sum"].replace(",", ""))
    return found


def measure(name: str, batch: int) -> list[dict]:
    cfg, of_cache = CASES[name]
    graph = replayed(step(cfg, batch))
    times = [1e3 * t for t in milliseconds(graph.replay, repeats=20)]
    case, formula = f"{name}-b{batch}", batch * of_cache + weights(cfg)
    return [
        row(case, "step", "us", statistics.median(times), {}, spread=spread(times)),
        row(case, "formula", "MB", formula / 1e6, {}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.once:
        once(arguments.batches)
        return
    machine, rows = limits(), []
    for name in CASES:
        for batch in arguments.batches:
            rows += measure(name, batch)
            torch.cuda.empty_cache()
    write("sparse_decode", rows, machine, selections="random")  # counting takes longer
    for (name, batch), read in counted(arguments.batches).items():
        formula = batch * CASES[name][1] + weights(CASES[name][0])
        peers = {"formula": formula / 1e6}
        made = row(f"{name}-b{batch}", "read", "MB", read / 1e6, peers, higher_is_better=False)
        rows.append(made)
    write("sparse_decode", rows, machine, selections="random")


if __name__ == "__main__":
    main()
