"""A training step on several GPUs: data and expert parallelism against one GPU of the same machine.

    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py [--out DIR] [--cases moe-1.25b]

Without GPUs ``--cases tiny-deepseek`` shows that it runs.

Weak scaling keeps the rows per GPU, strong scaling the rows in all; the peer ``one GPU`` takes the
step alone in the same run, times the number of GPUs. Pure bf16, AdamW and clipping as in training.
The exchange's share is of the time in which the GPU sends tokens; what is exposed is the part of it
in which nothing else runs. Its bandwidth stands beside that of an all-to-all of large equal parts.
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
from records import limits, milliseconds, row, spread, write
from torch.profiler import ProfilerActivity, profile

from fathom.config import ModelConfig, ParallelConfig
from fathom.parallel import ALONE, Layout, build, started
from fathom.parallel.step import accumulate
from fathom.presets import preset
from fathom.sizing.parallel import parallel_size
from fathom.train.config import TrainConfig
from fathom.train.optim import Optimizer, clip_gradients

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
        half = ParallelConfig(dp=2, ep=world // 2, shard=world)
        found[f"dp2-ep{world // 2}-fsdp{world}"] = half
    return found


def make_step(case: str, rows: int, layout: Layout) -> Callable[[], None]:
    """A whole optimizer step of this rank's ``rows``."""
    cfg, device = shape(case), torch.empty(0, device=DEVICE).device
    model = build(cfg, layout, seed=0, device=device, dtype=torch.bfloat16)
    optimizer = Optimizer(model, TrainConfig(steps=1), layout)
    draw = torch.Generator(device).manual_seed(layout.rank)
    tokens = torch.randint(cfg.vocab_size, (rows, ROWS[case][1]), device=device, generator=draw)
    targets, skip = tokens.roll(-1, dims=1), torch.zeros((), device=device)
    count = tokens.numel() * layout.world

    def step() -> None:
        accumulate(model, layout, last=True)
        losses = model.loss(tokens, targets, denominator=count, share=1 / layout.world)
        losses.total.backward()
        clip_gradients(model, 1.0, layout)
        optimizer.step(1e-4, skip)
        counts = [routed.tokens_per_expert for routed in losses.routing]
        model.update_expert_bias([layout.sum(count) for count in counts])
        model.zero_grad(set_to_none=True)

    return step


def measure(case: str, rows: int, layout: Layout, *, profiled: bool = False) -> dict[str, float]:
    """Tokens per second of all ranks, memory of this one, and the exchange's part of a step."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make_step(case, rows, layout)
    times = milliseconds(step, repeats=6, warmup=3)
    tokens = rows * ROWS[case][1] * layout.world
    found = {
        "tokens_per_second": tokens / statistics.median(times) * 1e3,
        "spread": spread(times),
        "gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    if profiled:
        found |= exchange_of(step, statistics.median(times))
    return found


def exchange_of(step: Callable[[], None], ms: float) -> dict[str, float]:
    """Shares of a step of ``ms`` in which tokens travel, and in which only they do."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    sends = [(e.time_range.start, e.time_range.end) for e in kernels if EXCHANGE in e.name]
    other = [(e.time_range.start, e.time_range.end) for e in kernels if "nccl" not in e.name]
    sending = covered(sends)
    exposed = covered([*sends, *other]) - covered(other)
    return {
        "exchange_share": sending / 1e3 / ms,
        "exposed_share": exposed / 1e3 / ms,
        "us": sending,
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


def compare(
    case: str, alone: dict[str, float], layout: Layout, name: str, machine: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows of one layout: weak and strong scaling, memory, the exchange."""
    per_gpu, length = ROWS[case]
    weak = measure(case, per_gpu, layout, profiled=layout.cfg.ep > 1 and DEVICE == "cuda")
    rows = []
    ideal = {f"one GPU x {layout.world}": layout.world * alone["tokens_per_second"]}
    of = f"{case}-{name}"
    speed = weak["tokens_per_second"]
    rows.append(
        row(f"{of}-weak", "tokens_per_second", "tokens/s", speed, ideal, spread=weak["spread"])
    )
    rows.append(
        row(
            f"{of}-weak",
            "peak_memory",
            "GB",
            weak["gb"],
            {"one GPU": alone["gb"]},
            higher_is_better=False,
        )
    )
    if "us" in weak:
        rows += [
            row(of, key, "share of step", weak[key], {})
            for key in ("exchange_share", "exposed_share")
        ]
        sent = parallel_size(shape(case), layout.cfg, n_tokens=per_gpu * length)["wire"]["exchange"]
        limit = {"large equal parts": machine["all_to_all_gb_per_s"]}
        rate = sent / max(weak["us"], 1) / 1e3
        rows.append(row(of, "exchange_rate", "GB/s", rate, limit))
    if per_gpu % layout.world == 0:
        strong = measure(case, per_gpu // layout.world, layout)
        speed = strong["tokens_per_second"]
        rows.append(
            row(
                f"{of}-strong",
                "tokens_per_second",
                "tokens/s",
                speed,
                ideal,
                spread=strong["spread"],
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(ROWS)[:2])
    parser.add_argument("--out")
    cases = parser.parse_args().cases
    torch.set_float32_matmul_precision("high")
    world = int(os.environ["WORLD_SIZE"])
    rows = []
    with started(ParallelConfig(dp=world), "auto") as whole:
        machine = limits()
        machine["all_to_all_gb_per_s"] = all_to_all_gb_per_s(whole)
        for case in cases:
            alone = measure(case, ROWS[case][0], ALONE)  # every GPU for itself, at once
            for name, cfg in layouts(world).items():
                rows += compare(case, alone, Layout(cfg, whole.rank, DEVICE), name, machine)
                if whole.leads:
                    write("expert_parallel", rows, machine, gpus=world)


if __name__ == "__main__":
    main()
