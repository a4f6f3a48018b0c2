"""What every benchmark shares: timing on a device, the machine's limits, and the record it writes.

A record is one JSON file in ``results/``: what ran, on what, and rows of
``case, metric, unit, ours, peers, ratio_to_best_peer, spread``. A ratio above 1 is better for us.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def milliseconds(run: Callable[[], object], *, repeats: int = 10, warmup: int = 3) -> list[float]:
    """Time of each of ``repeats`` calls, by CUDA events or the clock, after ``warmup`` calls."""
    for _ in range(warmup):
        run()
    if not torch.cuda.is_available():
        return [_clocked(run) for _ in range(repeats)]
    torch.cuda.synchronize()
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _clocked(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def as_graph(run: Callable[[], object]) -> Callable[[], None]:
    """The launches of ``run`` as one CUDA graph: what it takes is the device's work alone."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def row(
    case: str,
    metric: str,
    unit: str,
    ours: float,
    peers: Mapping[str, float],
    *,
    spread: float | None = None,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """One line of a record. ``spread``: (largest - smallest) / median of our repeats."""
    best = (max if higher_is_better else min)(peers.values()) if peers else None
    ratio = None
    if best:
        ratio = ours / best if higher_is_better else best / ours
    return {
        "case": case,
        "metric": metric,
        "unit": unit,
        "ours": ours,
        "peers": dict(peers),
        "ratio_to_best_peer": ratio,
        "spread": spread,
    }


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def limits() -> dict[str, float]:
    """What the machine can do, measured now: a bf16 product and a copy on CUDA, else float32's."""
    if torch.cuda.is_available():
        size, dtype, device = 8192, torch.bfloat16, "cuda"
    else:
        size, dtype, device = 1024, torch.float32, "cpu"
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    product = statistics.median(milliseconds(lambda: a @ b))
    big = torch.empty(2**30 if device == "cuda" else 2**26, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    copy = statistics.median(milliseconds(lambda: other.copy_(big)))
    return {
        "gemm_tflops": 2 * size**3 / product / 1e9,
        "copy_tb_per_s": 2 * big.numel() / copy / 1e9,
    }


def write(
    benchmark: str, rows: list[dict[str, Any]], machine: Mapping[str, float], **more: Any
) -> Path:
    """Write ``<benchmark>-<device>-<date>.json`` to ``--out`` (default: ``results/``), print it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_known_args()[0].out
    date = datetime.date.today().isoformat()
    record = {
        "benchmark": benchmark,
        "device": device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": _commit(),
        "date": date,
        "limits": machine,
        "rows": rows,
        **more,
    }
    short = "cpu"
    if torch.cuda.is_available():
        short = next((w for w in device_name().lower().split() if w[0] in "habl"), "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{short}-{date}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for line in rows:
        peers = ", ".join(f"{name} {value:.4g}" for name, value in line["peers"].items())
        ratio = line["ratio_to_best_peer"]
        print(
            f"{line['case']:<24} {line['metric']:<20} {line['ours']:>10.4g} {line['unit']:<10} "
            f"{peers}" + (f"  ratio {ratio:.3f}" if ratio else "")
        )
    print(f"wrote {path}")
    return path


def _commit() -> str | None:
    """The code's commit: of this checkout, or what ``FATHOM_COMMIT`` says of a copy of it."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    here = done.stdout.strip() if done.returncode == 0 else None
    return os.environ.get("FATHOM_COMMIT", here)
