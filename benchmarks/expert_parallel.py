"""A training step on several GPUs: data and expert parallelism against one GPU of the same machine.

    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py [--out DIR] [--cases moe-1.25b]
        [--layouts dp2 fsdp2 ep2 ep2-fsdp2] [--strong] [--eager] [--torchtitan]

Without GPUs ``--cases tiny-deepseek --eager`` shows that it runs.

Weak scaling keeps the rows per GPU, strong scaling (``--strong``) the rows in all; the peer ``one
GPU`` takes the step alone in the same run, times the number of GPUs. Blocks are compiled, as
``train.compile`` does, unless ``--eager``; pure bf16, AdamW and clipping as in training. One step
of each layout is profiled: the share of its time in which the GPU idles, in which it sends anything
or tokens, and of these the parts in which nothing else runs. The exchange's bandwidth stands beside
that of an all-to-all of large equal parts. ``--torchtitan`` sets torchtitan, blocks sharded by
FSDP2 as its own trainer shards them, beside our layout of that name; without clipping.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torchtitan_peer
from records import limits, milliseconds, row, spread, write
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from fathom.config import ModelConfig, ParallelConfig
from fathom.parallel import ALONE, Layout, build, started
from fathom.parallel.step import accumulate
from fathom.presets import preset
from fathom.sizing.parallel import parallel_size
from fathom.train.config import TrainConfig
from fathom.train.metrics import Sums
from fathom.train.optim import Optimizer, clip_factor, gradient_norm

ROWS = {"moe-1.25b": (8, 2048), "v2-lite-8l": (4, 4096), "tiny-deepseek": (4, 64)}  # a GPU's, long
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXCHANGE = "SendRecv"  # NCCL's kernel of an all-to-all


def shape(case: str) -> ModelConfig:
    if case != "v2-lite-8l":
        return preset(case)
    model = preset("deepseek-v2-lite")
    first, rest = model.groups
    return replace(model, groups=(first, replace(rest, count=7)))


def layouts(world: int) -> dict[str, ParallelConfig]:
    """Those of ``world`` GPUs that differ."""
    found = {
        f"dp{world}": ParallelConfig(dp=world),
        f"fsdp{world}": ParallelConfig(dp=world, shard=world),
        f"ep{world}": ParallelConfig(ep=world),
        f"ep{world}-fsdp{world}": ParallelConfig(ep=world, shard=world),
    }
    if world >= 4:
        half = world // 2
        found[f"dp2-ep{half}"] = ParallelConfig(dp=2, ep=half)
        found[f"dp2-ep{half}-fsdp{world}"] = ParallelConfig(dp=2, ep=half, shard=world)
    return found


def make_step(case: str, rows: int, layout: Layout, *, compiled: bool) -> Callable[[], None]:
    """A whole optimizer step of this rank's ``rows``."""
    cfg, device = shape(case), torch.empty(0, device=DEVICE).device
    model = build(cfg, layout, seed=0, device=device, dtype=torch.bfloat16)
    for block in model.blocks if compiled else ():
        block.compile()
    optimizer = Optimizer(model, TrainConfig(steps=1), layout)
    draw = torch.Generator(device).manual_seed(layout.rank)
    tokens = torch.randint(cfg.vocab_size, (rows, ROWS[case][1]), device=device, generator=draw)
    targets, skip = tokens.roll(-1, dims=1), torch.zeros((), device=device)
    count = tokens.numel() * layout.world

    def step() -> None:
        accumulate(model, layout, last=True)
        sums = Sums()
        losses = model.loss(tokens, targets, denominator=count, share=1 / layout.world)
        losses.total.backward()
        sums.add(losses)
        sums.over_ranks(layout)
        optimizer.step(1e-4, skip, clip_factor(gradient_norm(model, layout), 1.0))
        model.update_expert_bias(sums.counts)
        model.zero_grad(set_to_none=True)

    return step


def torchtitan_step(case: str, rows: int) -> Callable[[], None]:
    """Its step under FSDP2 over all ranks."""
    cfg, length = shape(case), ROWS[case][1]
    model: Any = torchtitan_peer.build(cfg, length, attention="sdpa", device=DEVICE)
    for block in (*model.layers.values(), model):
        fully_shard(block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    cross_entropy = torch.compile(torchtitan_peer.cross_entropy)
    tokens = torch.randint(cfg.vocab_size, (rows, length), device=DEVICE)
    targets = tokens.roll(-1, dims=1)

    def step() -> None:
        cross_entropy(model(tokens, attention_masks=None), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(make: Callable[[], Callable[[], None]], n_tokens: int) -> dict[str, float]:
    """Tokens per second of all ranks, memory of this one, and what one step's time is spent on."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make()
    times = milliseconds(step, repeats=8, warmup=4)
    found = {
        "tokens_per_second": n_tokens / statistics.median(times) * 1e3,
        "spread": spread(times),
        "gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0,
    }
    return found | (shares_of(step, statistics.median(times)) if DEVICE == "cuda" else {})


def ours(case: str, rows: int, layout: Layout, *, compiled: bool) -> dict[str, float]:
    """Of our step in a layout."""
    n_tokens = rows * ROWS[case][1] * layout.world
    return measure(lambda: make_step(case, rows, layout, compiled=compiled), n_tokens)


def shares_of(step: Callable[[], None], ms: float) -> dict[str, float]:
    """Of a step of ``ms``: shares in which nothing runs, in which NCCL does, or it alone.

    ``exchange_share`` and ``exposed_share`` are the same of the tokens that travel, ``us`` their
    time in microseconds.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, (e.time_range.start, e.time_range.end)) for e in kernels]
    wire = [span for name, span in spans if "nccl" in name]
    sends = [span for name, span in spans if EXCHANGE in name]
    other = [span for name, span in spans if "nccl" not in name]
    computing = covered(other)
    return {
        "idle_share": max(1 - covered([*wire, *other]) / 1e3 / ms, 0.0),
        "wire_share": covered(wire) / 1e3 / ms,
        "wire_alone_share": (covered([*wire, *other]) - computing) / 1e3 / ms,
        "exchange_share": covered(sends) / 1e3 / ms,
        "exposed_share": (covered([*sends, *other]) - computing) / 1e3 / ms,
        "us": covered(sends),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def all_to_all_gb_per_s(layout: Layout, mib: int = 256) -> float:
    """What each GPU sends to the others, per second, of large equal parts."""
    rows = torch.empty(mib * 2**20, dtype=torch.uint8, device=DEVICE)
    out = torch.empty_like(rows)
    times = milliseconds(lambda: dist.all_to_all_single(out, rows))
    return rows.numel() * (layout.world - 1) / layout.world / statistics.median(times) / 1e6


def weak(
    case: str,
    alone: dict[str, float],
    found: dict[str, float],
    layout: Layout,
    name: str,
    limit: float,
) -> list[dict[str, Any]]:
    """The rows of one layout: speed, memory, and where its time goes."""
    of, (per_gpu, length) = f"{case}-{name}", ROWS[case]
    ideal = {f"one GPU x {layout.world}": layout.world * alone["tokens_per_second"]}
    speed, gb = found["tokens_per_second"], {"one GPU": alone["gb"]}
    rows = [
        row(f"{of}-weak", "tokens_per_second", "tokens/s", speed, ideal, spread=found["spread"]),
        row(f"{of}-weak", "peak_memory", "GB", found["gb"], gb, higher_is_better=False),
    ]
    exchanged = ("exchange_share", "exposed_share") if layout.cfg.ep > 1 else ()
    always = ("idle_share", "wire_share", "wire_alone_share")
    for key in (*always, *exchanged) if "us" in found else ():
        rows.append(row(of, key, "share of step", found[key], {}))
    if exchanged and found.get("us"):
        sent = parallel_size(shape(case), layout.cfg, n_tokens=per_gpu * length)["wire"]["exchange"]
        rate = sent / found["us"] / 1e3
        rows.append(row(of, "exchange_rate", "GB/s", rate, {"large equal parts": limit}))
    return rows


def beside_torchtitan(
    case: str, found: dict[str, float], name: str, world: int
) -> list[dict[str, Any]]:
    """Speed and memory of one layout beside torchtitan's; nothing if that does not run here."""
    if not torchtitan_peer.available():
        return []
    per_gpu, length = ROWS[case]
    with torch._dynamo.config.patch(capture_scalar_outputs=False):  # torchtitan changes it
        try:
            theirs = measure(lambda: torchtitan_step(case, per_gpu), per_gpu * length * world)
        except Exception as error:  # ours has been measured, and is to be written
            print(f"{case} torchtitan did not run: {str(error)[:400]}", flush=True)
            return []
    of, speed, gb = f"{case}-{name}-torchtitan", found["tokens_per_second"], found["gb"]
    peer, memory = theirs["tokens_per_second"], {"torchtitan": theirs["gb"]}
    return [
        row(of, "tokens_per_second", "tokens/s", speed, {"torchtitan": peer}),
        row(of, "peak_memory", "GB", gb, memory, higher_is_better=False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(ROWS)[:2])
    parser.add_argument("--layouts", nargs="*")
    parser.add_argument("--strong", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--torchtitan", action="store_true")
    parser.add_argument("--out")
    chosen = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    world, rows = int(os.environ["WORLD_SIZE"]), []
    how = {"compiled": not chosen.eager}
    with started(ParallelConfig(dp=world), "auto") as whole:
        machine = limits()
        limit = machine["all_to_all_gb_per_s"] = all_to_all_gb_per_s(whole)

        def record(*new: dict[str, Any]) -> None:
            rows.extend(new)
            if whole.leads:
                write("expert_parallel", rows, machine, gpus=world, **how)

        known = layouts(world)
        found = {name: known[name] for name in chosen.layouts or known}
        for case in chosen.cases:
            per_gpu = ROWS[case][0]
            alone = ours(case, per_gpu, ALONE, **how)  # every GPU for itself, at once
            unit, speed = "tokens/s", alone["tokens_per_second"]
            record(row(f"{case}-one", "tokens_per_second", unit, speed, {}, spread=alone["spread"]))
            for name, cfg in found.items():
                layout = Layout(cfg, whole.rank, DEVICE)
                got = ours(case, per_gpu, layout, **how)
                record(*weak(case, alone, got, layout, name, limit))
                if chosen.torchtitan and name == f"fsdp{world}":
                    record(*beside_torchtitan(case, got, name, world))
            for name, cfg in found.items() if chosen.strong and per_gpu % world == 0 else ():
                layout, ideal = (
                    Layout(cfg, whole.rank, DEVICE),
                    {f"one GPU x {world}": world * speed},
                )
                got = ours(case, per_gpu // world, layout, **how)["tokens_per_second"]
                record(row(f"{case}-{name}-strong", "tokens_per_second", unit, got, ideal))


if __name__ == "__main__":
    main()
