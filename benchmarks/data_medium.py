"""Make the medium corpus and record what came out: python benchmarks/data_medium.py OUT.

Rows hold, for each domain, bytes, tokens and documents of both splits, what was dropped and why,
the overlap of held-out with training text that is left, and the seconds that selecting took.
"""

import argparse
import json
import platform
import subprocess
import time
from datetime import date
from pathlib import Path

import numpy
import tokenizers
from records import device_name, row

from fathom.data.assemble import describe
from fathom.data.medium import prepare_medium

RESULT = Path(__file__).parent / "results" / "data_medium_cpu.json"
UNITS = {"seconds": "s", "cap": "bytes", "residual_overlap": "share of 13-word windows"}


def rows_of(statistics: dict, seconds: float) -> list[dict[str, object]]:
    rows = []
    for name, domain in statistics["domains"].items():
        for split in ("train", "heldout"):
            for metric in ("documents", "bytes", "tokens"):
                rows.append(row(name, f"{split}_{metric}", metric, domain[split][metric], {}))
        for metric, value in statistics["made"][name].items():
            rows.append(row(name, metric, UNITS.get(metric, "documents"), value, {}))
    rows.append(row("all", "seconds", "s", round(seconds, 1), {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--packages", help="where fetched packages are kept")
    parser.add_argument("--size-mb", type=float, help="scale the caps of all domains to this")
    asked = parser.parse_args()
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if not stages or stages[-1] != stage:
            stages.append(stage)
            print(f"{time.perf_counter() - started:6.1f} s  {stage}", flush=True)

    started = time.perf_counter()
    statistics = prepare_medium(
        asked.out, size_mb=asked.size_mb, packages=asked.packages, progress=progress
    )
    seconds = time.perf_counter() - started
    print(describe(statistics), f"\n{seconds:.0f} s")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "benchmark": "data_medium_cpu",
        "device": device_name(),
        "versions": {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "limits": {},
        "packages": statistics["packages"],
        "rows": rows_of(statistics, seconds),
    }
    if asked.size_mb is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
