"""A save, broken at every system call in every way: ``python faults.py FOLDER FAULTS.so``.

Runs with ``FAULTS.so`` (``faults.c``) preloaded, prints what it found as JSON. Each trial is a
forked process that saves step 3 where steps 1 and 2 lie; afterwards the newest checkpoint must be
whole, be 3 if the save said so, and the next save must work and leave nothing behind.
"""

import ctypes
import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fathom.chaos.children import KILLED, Child
from fathom.chaos.saves import clear
from fathom.convert.run_folder import committed, newest, step_of, sweep
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.model import build_model
from fathom.train.checkpoint import Parts, Snapshot, save, snapshot
from fathom.train.config import read_run_config
from fathom.train.guards import SpikeGuard
from fathom.train.optim import Optimizer

KINDS = {  # code for faults.c, and whether every later call fails too
    "SIGKILL": (-1, False),
    "ENOSPC": (errno.ENOSPC, True),
    "EIO": (errno.EIO, False),
    "EROFS": (errno.EROFS, True),
    "EINTR": (errno.EINTR, False),
    "short write": (-2, False),
}
FAILED = 1
ENDS = {0: "saved", FAILED: "refused", KILLED: "killed"}


def a_checkpoint() -> Snapshot:
    """Of a model of a few thousand parameters."""
    group = {
        "count": 1,
        "attention": {
            **{"kind": "mha", "n_heads": 1, "n_kv_heads": 1, "head_dim": 8},
            "position": {"kind": "rope"},
        },
        "ffn": {"kind": "dense", "inter_dim": 8},
    }
    cfg = read_run_config(
        {
            "model": {"vocab_size": 1024, "dim": 4, "max_seq_len": 256, "groups": [group]},
            "train": {"steps": 9},
        }
    )
    model = build_model(cfg.model, seed=1)
    parts = Parts(model, Optimizer(model, cfg.train), SpikeGuard(0.0, torch.device("cpu")))
    return snapshot(cfg, parts, Tokenizer.load(BUNDLED / "tokenizer-1k.json"))


def trial(
    run: Path, taken: Snapshot, arm: Callable[[], None], count: Path | None = None
) -> tuple[int, str]:
    """How the save ended (0, FAILED or KILLED), and what is wrong afterwards, or ``""``."""
    clear(run)
    for step in (1, 2):
        save(run, replace(taken, step=step))
    faults = ctypes.CDLL(None)

    def work() -> int:
        arm()
        try:
            save(run, replace(taken, step=3))
        except OSError:
            return FAILED
        finally:
            calls = faults.fault_count()
            faults.fault_arm(0, 0, 0)
            if count is not None:
                count.write_text(str(calls))
        return 0

    code = Child(work, run.with_name("log")).wait()
    if code not in (0, FAILED, KILLED):
        return code, run.with_name("log").read_text()[-300:]
    damaged: list[str] = []
    found = newest(run, warn=damaged.append)
    if found is None or damaged or step_of(found) < (3 if code == 0 else 2):
        return code, f"the newest is {found}; {damaged}"
    sweep(run)
    save(run, replace(taken, step=4))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    if names != [path.name for path in committed(run)]:
        return code, f"left behind: {names}"
    return code, "" if step_of(committed(run)[-1]) == 4 else "the next save was lost"


def every_point(folder: Path) -> dict[str, Any]:
    """Every kind at every call."""
    torch.set_num_threads(1)
    taken, run, count = a_checkpoint(), folder / "run", folder / "count"
    arm = ctypes.CDLL(None).fault_arm
    assert trial(run, taken, lambda: arm(0, 0, 0), count) == (0, "")
    calls, failures, ends = int(count.read_text()), [], Counter()
    for name, (kind, stays) in KINDS.items():
        for at in range(1, calls + 1):
            arming = lambda at=at, kind=kind, stays=stays: arm(at, kind, stays)  # noqa: E731
            code, problem = trial(run, taken, arming)
            ends[name, ENDS.get(code, str(code))] += 1
            failures += [f"{name} at call {at} of {calls}: {problem}"] if problem else []
    outcomes = {f"{name}: {end}": times for (name, end), times in sorted(ends.items())}
    return {"calls": calls, "outcomes": outcomes, "failures": failures}


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)
    json.dump(every_point(Path(sys.argv[1])), sys.stdout)
