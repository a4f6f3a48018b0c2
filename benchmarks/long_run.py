"""A run of some hundred steps on real text over several GPUs, against the same run on one.

    python benchmarks/long_run.py --data DIR [--steps 500] [--seeds 3] [--layouts ep2] [--out DIR]

Arithmetic in another order parts two runs of the same seed after some steps, as another seed parts
them at once; the question is whether the first is within the second. Runs of one process, one per
seed, are spread over the GPUs; then each layout takes all of them, with seed 0. The model is the
``tiny-deepseek`` preset (MLA, MoE, MTP) in bf16_autocast; figures are held-out bits per byte.
Without GPUs two processes show that it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from records import limits, row, write

LAYOUTS = {
    "dp2": ["parallel.dp=2"],
    "ep2": ["parallel.ep=2"],
    "ep2-fp8": ["parallel.ep=2", "parallel.dispatch=fp8"],
    "ep2-shard2": ["parallel.ep=2", "parallel.shard=2"],
    "dp2-ep2": ["parallel.dp=2", "parallel.ep=2"],
}


def start(
    out: Path, data: Path, steps: int, seed: int, *keys: str, gpu: int | None = None
) -> subprocess.Popen[bytes]:
    """Train into ``out``; on one GPU, or on all that are there."""
    vocab = json.loads((data / "meta.json").read_text())["vocab_size"]
    config = out.with_suffix(".toml")
    config.write_text(
        f'[model]\npreset = "tiny-deepseek"\nvocab_size = {vocab}\n'
        f'[data]\nsource = "{data}"\nseq_len = 512\n'
        f"[train]\nsteps = {steps}\nseed = {seed}\ntokens_per_step = 16384\nlr = 2e-3\n"
        f'warmup_steps = {steps // 10}\ndtype = "bf16_autocast"\nsave_every = {steps}\n'
        f"eval_every = {steps}\neval_bytes = 262144\n"
    )
    command = [sys.executable, "-m", "fathom", "train", str(config), "--out", str(out), *keys]
    alone = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return subprocess.Popen(command, env={**os.environ, **alone}, stdout=subprocess.DEVNULL)


def result(run: subprocess.Popen[bytes], out: Path) -> tuple[float, float]:
    """Held-out bits per byte at its end, and the median of its tokens per second."""
    if run.wait():
        raise SystemExit(f"{out.name} failed")
    speeds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(one["tokens_per_second"] for one in speeds)
    return json.loads((out / "eval.jsonl").read_text().splitlines()[-1])["val_bpb"], speed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layouts", nargs="*", default=["ep2"])
    parser.add_argument("--out")
    chosen = parser.parse_args()
    of, gpus = (chosen.data.resolve(), chosen.steps), torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        seeds = {seed: Path(folder) / f"seed{seed}" for seed in range(chosen.seeds)}
        found = []
        for first in range(0, chosen.seeds, gpus):
            some = list(seeds.items())[first : first + gpus]
            runs = [(start(out, *of, seed, gpu=i), out) for i, (seed, out) in enumerate(some)]
            found += [result(*run) for run in runs]
        bpb, speed = [one[0] for one in found], statistics.median(one[1] for one in found)
        apart = max(bpb) - min(bpb)
        rows = [
            row("one-gpu", "bits_per_byte", "bits", statistics.mean(bpb), {}, spread=apart),
            row("one-gpu", "tokens_per_second", "tokens/s", speed, {}),
        ]
        for name in chosen.layouts:
            out, keys = Path(folder) / name, [f"--nproc={gpus}", *LAYOUTS[name]]
            got, fast = result(start(out, *of, 0, *keys), out)
            same = {"one GPU, same seed": bpb[0]}
            rows += [
                row(name, "bits_per_byte", "bits", got, same, higher_is_better=False),
                row(name, "tokens_per_second", "tokens/s", fast, {"one GPU": speed}),
            ]
        write("long_run", rows, limits(), gpus=gpus, steps=chosen.steps, bits_by_seed=bpb)


if __name__ == "__main__":
    main()
