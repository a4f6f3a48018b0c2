"""What the guards cost: tokens per second with all of them and a background save every 50 steps.

Two trainers of the same model and data take turns of 50 steps. One has every guard, the watchdog
and a save in the middle of each turn, which goes on while the rest of the turn does; the other
judges no step and saves nothing. The fastest turn of each counts: what is else on the machine only
ever slows one down. On a GPU the clock is that on the wall. On a CPU it is the time that all
threads of the process have computed, the writing thread's too, which other processes hardly change.

    python benchmarks/guards.py [--config configs/tiny.toml] [--turns 3] [key=value ...]
"""

import argparse
import itertools
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from records import limits, row, spread, write

from fathom.data.dataset import open_dataset
from fathom.train.config import read_run_config
from fathom.train.device import pick_device
from fathom.train.loop import Trainer
from fathom.train.progress import Reporter

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
TURN = 50
SAVES = {"bare": "train.save_every=1000000", "guarded": f"train.save_every={TURN}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=TINY)
    parser.add_argument("--turns", type=int, default=3)
    args, rest = parser.parse_known_args()
    settings = [item for item in rest if "=" in item and not item.startswith("-")]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        trainers = {way: trainer(way, args.config, settings, Path(scratch)) for way in SAVES}
        for one in trainers.values():
            stack.enter_context(closing(one))
        stack.enter_context(trainers["guarded"].watchdog)
        for one in trainers.values():
            turn(one, TURN // 2)  # so that saves fall in the middle of the turns that count
        found: dict[str, list[list[float]]] = {way: [] for way in SAVES}
        for _ in range(args.turns):
            for way, one in trainers.items():
                found[way].append(turn(one, TURN))
                print(way, f"{sum(found[way][-1]):.2f} s", flush=True)
    tokens = TURN * trainers["bare"].cfg.train.tokens_per_step
    speeds = {way: [tokens / sum(steps) for steps in turns] for way, turns in found.items()}
    pauses = {
        way: 1e3 * min(max(steps) - statistics.median(steps) for steps in turns)
        for way, turns in found.items()
    }
    case = " ".join([args.config.stem, *settings])
    rows = [
        row(
            case,
            "throughput with guards and saves",
            "tokens/s",
            max(speeds["guarded"]),
            {"without guards and saves": max(speeds["bare"])},
            spread=spread(speeds["guarded"]),
        ),
        row(
            case,
            "longest step over the median one",
            "ms",
            pauses["guarded"],
            {"without guards and saves": pauses["bare"]},
            higher_is_better=False,
        ),
    ]
    clock = "wall" if torch.cuda.is_available() else "processor time of all threads"
    write("guards", rows, limits(), turns=args.turns, clock=clock)


def trainer(way: str, config: Path, settings: list[str], scratch: Path) -> Trainer:
    """At the beginning of its run."""
    quick = ("train.steps=100000", "train.eval_every=0", "train.sample_every=0")
    keys = [*quick, "train.async_save=true", SAVES[way], *settings]
    cfg = read_run_config(config, keys)
    (scratch / way).mkdir()
    more = {"reporter": Reporter(), "sample": None, "start": None}
    device = pick_device(cfg.train.device)
    made = Trainer(cfg, scratch / way, open_dataset(cfg.data), device=device, **more)
    if way == "bare":
        good = torch.zeros((), device=device)
        verdict = {"not_finite": good, "spike": good}
        made.learner.guard.judge = lambda loss, grad_norm: verdict
    return made


def turn(one: Trainer, steps: int) -> list[float]:
    """Seconds of each of so many steps, with what comes between them."""
    times = [clock()]
    for _ in range(steps):
        one.step()
        one.look_around(saving=False)
        times.append(clock())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        times[-1] = clock()
    one.saved(waiting=True)  # what is left of the save is no longer this turn's, nor the next's
    return [after - before for before, after in itertools.pairwise(times)]


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


if __name__ == "__main__":
    main()
