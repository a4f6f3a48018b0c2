"""What the guards cost: tokens per second with all of them and a background save every 50 steps.

Both runs train the same model on the same data, in turns of one run each, in processes of their
own. The second half of the steps counts, with everything in it: also the copy that a save makes.
On a CPU the clock is that of the training thread's own work (give it one thread), which other
processes on the machine do not slow down; on a GPU it is that on the wall. Beside it stands the
longest step over the median one.

    python benchmarks/guards.py [--steps 200] [--repeats 3] [key=value ...]
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from records import limits, row, spread, write

from fathom.train.config import read_run_config
from fathom.train.loop import train
from fathom.train.progress import Reporter

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"
WAYS = {
    "bare": ("train.spike_sigmas=0", "train.save_every=1000000"),
    "guarded": ("train.spike_sigmas=6", "train.save_every=50", "train.async_save=true"),
}


class Clock(Reporter):
    """Remembers when each step's line was written."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, record: dict[str, object]) -> None:
        self.times.append(time.perf_counter() if torch.cuda.is_available() else time.thread_time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=WAYS, help="train once and print the figures")
    args, settings = parser.parse_known_args()
    settings = [item for item in settings if "=" in item and not item.startswith("-")]
    if args.one:
        print(json.dumps(measure(args.one, args.steps, settings)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, "--steps", str(args.steps)]
            done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
    speeds = {way: [one["tokens_per_second"] for one in found[way]] for way in WAYS}
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    pause = statistics.median(one["longest_ms"] - one["median_ms"] for one in found["guarded"])
    noise = statistics.median(one["longest_ms"] - one["median_ms"] for one in found["bare"])
    peers = {"without guards and saves": medians["bare"]}
    case = "tiny-deepseek" if not settings else " ".join(settings)
    rows = [
        row(
            case,
            "throughput with guards and saves",
            "tokens/s",
            medians["guarded"],
            peers,
            spread=spread(speeds["guarded"]),
        ),
        row(
            case,
            "longest step over the median one",
            "ms",
            pause,
            {"without saves": noise},
            higher_is_better=False,
        ),
    ]
    write("guards", rows, limits(), steps=args.steps, repeats=args.repeats)


def measure(way: str, steps: int, settings: list[str]) -> dict[str, float]:
    """Train once; the whole second half counts, its saves included."""
    quick = (f"train.steps={steps}", "train.eval_every=0", "train.sample_every=0")
    cfg = read_run_config(CONFIG, [*quick, *settings, *WAYS[way]])
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        train(cfg, Path(scratch) / "run", reporter=clock, should_stop=lambda: False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    half = clock.times[steps // 2 :]
    each = [1e3 * (b - a) for a, b in itertools.pairwise(half)]
    return {
        "tokens_per_second": cfg.train.tokens_per_step * len(each) / (half[-1] - half[0]),
        "median_ms": statistics.median(each),
        "longest_ms": max(each),
    }


if __name__ == "__main__":
    main()
