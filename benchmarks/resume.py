"""Chains of five stops at random steps against the run that never stopped, to the last bit.

The whole cross product: a Llama-like and a DeepSeek-like model (MLA, experts balanced without a
loss, MTP), AdamW and Muon, saves that wait and saves in the background, whole and accumulated
batches, one process and two. Records of every step and the bytes of the last checkpoint must be
those of the run that never stopped. The models are tiny; the steps and stops are not fewer.

    python benchmarks/resume.py [--steps 500] [--stops 5] [--skip 0] [--minutes 60]
                                [--folder /dev/shm]
"""

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from records import limits, row, write

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.chaos.children import Child, placed
from fathom.chaos.field import difference
from fathom.data.dataset import Dataset, open_dataset
from fathom.parallel.launch import free_port
from fathom.train.config import RunConfig, read_run_config
from fathom.train.loop import train

MHA = {"kind": "mha", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "position": {"kind": "rope"}}
MLA = {
    **{"kind": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 8, "position": {"kind": "rope"}},
}
DENSE = {"kind": "dense", "inter_dim": 24}
MOE = {
    **{"kind": "moe", "n_routed_experts": 6, "n_shared_experts": 1, "top_k": 2, "inter_dim": 8},
    **{"score_func": "sigmoid", "norm_topk_prob": True},
    "balance": [{"kind": "aux_loss_free"}, {"kind": "seq_aux_loss"}],
}
FAMILIES = {
    "llama": ([(MHA, DENSE), (MHA, DENSE)], {}, {"dp": 2, "shard": 2}),
    "deepseek": (
        [(MLA, DENSE), (MLA, MOE)],
        {"mtp": {"n_mtp_modules": 1}},
        {"ep": 2, "shard": 2},
    ),
}
WAYS = {
    "ranks": (1, 2),
    "optimizer": ("adamw", "muon"),
    "async_save": (False, True),
    "micro_batch_size": (None, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--skip", type=int, default=0, help="the first of the 32 ways to run")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, default=None)
    args, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    begun, tried, same = time.monotonic(), {}, {}
    for family, ranks, cfg in itertools.islice(combinations(args.steps), args.skip, None):
        if time.monotonic() - begun > 60 * args.minutes:
            break
        case = f"{family}, {ranks} process{'es' * (ranks > 1)}"
        tried[case], same[case] = tried.get(case, 0) + 1, same.get(case, 0)
        with tempfile.TemporaryDirectory(prefix="fathom-resume-", dir=args.folder) as scratch:
            problem = differs(cfg, Path(scratch), args.stops, seed=sum(tried.values()))
        same[case] += problem is None
        about = cfg.train.optimizer, cfg.train.async_save, cfg.train.micro_batch_size
        print(f"{time.monotonic() - begun:5.0f} s", case, *about, problem or "same", flush=True)
    metric = f"equal to the bit after {args.stops} stops in {args.steps} steps"
    rows = [row(case, metric, "chains", same[case], {"tried": tried[case]}) for case in tried]
    write("resume_rest" if args.skip else "resume", rows, limits(), skipped=args.skip, **WAYS)


def combinations(steps: int) -> Iterator[tuple[str, int, RunConfig]]:
    """Family, processes and config of every way to run."""
    for family, ranks, *rest in itertools.product(FAMILIES, *WAYS.values()):
        layers, model, layout = FAMILIES[family]
        groups = [{"count": 1, "attention": attention, "ffn": ffn} for attention, ffn in layers]
        recipe = dict(zip(list(WAYS)[1:], rest, strict=True))
        data = {
            "model": {"vocab_size": 1024, "dim": 16, "max_seq_len": 32, "groups": groups, **model},
            "data": {"seq_len": 32},
            "train": {
                **{"steps": steps, "tokens_per_step": 128, "lr": 0.01, "eval_every": 0},
                **{"save_every": max(steps // 7, 1), **recipe},
            },
            "parallel": layout if ranks > 1 else {},
        }
        yield family, ranks, read_run_config(data)


def differs(cfg: RunConfig, folder: Path, stops: int, seed: int) -> str | None:
    """Train without a stop, and with so many; the first difference, or None."""
    dataset = open_dataset(cfg.data)
    at = sorted(random.Random(seed).sample(range(1, cfg.train.steps), stops))
    pieces = [b - a for a, b in itertools.pairwise([0, *at])]
    for run, steps in (("whole", None), *(("parts", piece) for piece in pieces), ("parts", None)):
        codes = together(cfg, folder / run, dataset, steps)
        if set(codes) != {0 if steps is None else 75}:
            said = (folder / f"{run}.log").read_text().strip()
            return f"{run} ended with {codes}: {said[-300:]}"
    return difference(folder / "parts", folder / "whole")


def together(cfg: RunConfig, run: Path, dataset: Dataset, steps: int | None) -> list[int]:
    """Train all ranks for so many steps (None: to the end); their exit codes."""
    size, port = cfg.parallel.world, free_port()
    work = partial(steps_of, cfg, run, dataset, steps)
    ranks = [Child(placed(work, r, size, port), run.with_suffix(".log")) for r in range(size)]
    return [child.wait() for child in ranks]


def steps_of(cfg: RunConfig, run: Path, dataset: Dataset, steps: int | None) -> int:
    done = itertools.count(1)
    return train(cfg, run, dataset=dataset, should_stop=lambda: next(done) == steps).exit_code


if __name__ == "__main__":
    main()
