"""How fast is a checkpoint loaded? Against a plain read of its files, and against transformers.

A random DeepSeek-V2-Lite in bfloat16, with V2-Lite's layers and experts and so its 5,291 tensors:
narrowed to 2 GB, or (``--full``) as it is, 31 GB. Each load runs in a process of its own, in turns;
the files are in the system's cache before. A plain read is ``read`` of every file into new memory.
Without transformers here, ours is compared with the plain read alone.

    python benchmarks/load_checkpoint.py [--full] [--device cuda] [--repeats 3] [--folder DIR]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from records import limits, row, spread, write

import fathom

NARROW = (
    "dim=512",
    "groups.0.ffn.inter_dim=2736",
    "groups.1.ffn.inter_dim=352",
    "groups.*.attention.kv_lora_rank=128",
    "groups.*.attention.n_heads=4",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--one", choices=WAYS, help="load once and print the figures")
    args, _ = parser.parse_known_args()
    if args.one:
        print(json.dumps(measure(args.one, args.folder, args.device)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "v2-lite"
        if not folder.exists():
            make(folder, full=args.full)
        compare(folder, args.device, args.repeats, "v2-lite" if args.full else "v2-lite-2gb")


def make(folder: Path, *, full: bool) -> None:
    """The checkpoint, of numbers that are not all alike."""
    changes = () if full else NARROW
    cfg = fathom.build("deepseek-v2-lite", *changes, device="meta").cfg
    print(f"making {fathom.size(cfg)['params'] / 1e9:.2f} G parameters", flush=True)
    fathom.save(fathom.build(cfg, dtype="bfloat16"), folder, format="hf")


def compare(folder: Path, device: str, repeats: int, case: str) -> None:
    ways = [way for way in WAYS if way != "transformers" or find_spec(way)]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for way in ways * (1 + repeats):  # the first turn warms the cache
        command = [sys.executable, __file__, "--one", way, "--folder", str(folder)]
        done = subprocess.run([*command, "--device", device], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[way].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{way:<14} {found[way][-1]}", flush=True)
    rates = {way: [one["gb_per_s"] for one in ones[1:]] for way, ones in found.items()}
    middle = {way: statistics.median(values) for way, values in rates.items()}
    peak = {way: max(one["peak_gb"] for one in ones) for way, ones in found.items()}
    peers = [way for way in ways if way == "transformers"]
    machine = {**limits(), "plain_read_gb_per_s": middle["read"]}
    rows = [
        row(
            case,
            "rate",
            "GB/s",
            middle["ours"],
            {way: middle[way] for way in peers},
            spread=spread(rates["ours"]),
        ),
        row(case, "share of a plain read", "", middle["ours"] / middle["read"], {}),
        row(
            case,
            "peak host memory",
            "GB",
            peak["ours"],
            {way: peak[way] for way in peers},
            higher_is_better=False,
        ),
    ]
    write("load_checkpoint" if device == "cpu" else "load_checkpoint_gpu", rows, machine)


def measure(way: str, folder: Path, device: str) -> dict[str, float]:
    """One load in this process: its rate, and the most memory that the process has held."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    load = WAYS[way]
    if way == "transformers":  # importing is not part of the time
        from transformers import AutoModelForCausalLM  # noqa: F401
    elif way == "ours":
        _ = fathom.load
    torch.empty(1, device=device)
    start = time.perf_counter()
    kept = load(folder, device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del kept
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "gb_per_s": size / seconds / 1e9, "peak_gb": peak / 1e9}


def plain_read(folder: Path, device: str) -> object:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def ours(folder: Path, device: str) -> object:
    return fathom.load(folder, device=device)


def theirs(folder: Path, device: str) -> object:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device)


WAYS = {"read": plain_read, "ours": ours, "transformers": theirs}

if __name__ == "__main__":
    main()
