"""The spike guard on curves of real runs: clean steps that it would skip, and spikes it would miss.

Every ``metrics.jsonl`` below the folders named is replayed: as it is; and with every 37th step
after the first 128 made a spike: its loss, or its gradient norm, is ten times the geometric mean of
the 128 steps before. A step that the run itself skipped is left out.

    python benchmarks/spikes.py runs/demo-gpu [more folders]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from records import limits, row, write
from torch import Tensor

from fathom.train.guards import WINDOW, SpikeGuard
from fathom.train.metrics import read_lines

EVERY = 37


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    args, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    curves = [
        curve
        for folder in args.folders
        for path in sorted(folder.rglob("metrics.jsonl"))
        if len(curve := figures(path)) > WINDOW
    ]
    steps = sum(map(len, curves))
    skipped = sum(len(spikes(curve)) for curve in curves)
    case = f"{len(curves)} runs, {steps} steps"
    lower = {"higher_is_better": False}
    rows = [row(case, "clean steps skipped", "in 10,000", 1e4 * skipped / steps, {}, **lower)]
    for column, name in enumerate(("losses", "gradient norms")):
        caught = wanted = 0
        for curve in curves:
            at = range(WINDOW, len(curve), EVERY)
            spiky = curve.clone()
            for step in at:
                spiky[step, column] = 10 * curve[step - WINDOW : step, column].log().mean().exp()
            caught += len(set(at) & set(spikes(spiky)))
            wanted += len(at)
        rows.append(row(case, f"tenfold {name} caught", "spikes", caught, {"injected": wanted}))
    write("spikes", rows, limits())


def figures(path: Path) -> Tensor:
    """Losses and gradient norms ``[steps, 2]`` of the steps that counted."""
    counted = [line for line in read_lines(path) if not line.get("skipped")]
    return torch.tensor([[line["total_loss"], line["grad_norm"]] for line in counted])


def spikes(curve: Tensor) -> Sequence[int]:
    """The steps, from 0, that the guard would skip."""
    guard = SpikeGuard(6.0, torch.device("cpu"))
    return [at for at, (loss, norm) in enumerate(curve) if guard.judge(loss, norm)["spike"] > 0]


if __name__ == "__main__":
    main()
