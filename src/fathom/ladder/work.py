"""The ladder's tasks: train and measure one run, probe a trained one, or time an arm's steps."""

import ctypes
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import torch

from fathom.convert.run_folder import load_model
from fathom.data.dataset import Dataset, open_dataset
from fathom.ladder.pool import reason
from fathom.probes import PROBES, Context
from fathom.settings import Data
from fathom.train.config import RunConfig
from fathom.train.device import memory_bytes, pick_device
from fathom.train.evaluate import Evaluation, evaluate
from fathom.train.loop import train
from fathom.train.metrics import read_lines

RESULT = "result.json"
CURVE_POINTS = 64


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Train one arm with one seed in ``folder``, then measure it on all held-out documents."""

    arm: str
    cfg: RunConfig
    folder: Path
    key: str

    @property
    def file(self) -> Path:
        return self.folder / RESULT

    def run(self) -> Data:
        begun = time.perf_counter()
        dataset = open_dataset(self.cfg.data)
        result = train(self.cfg, self.folder, dataset=dataset)
        if result.reason == "interrupted":
            raise KeyboardInterrupt  # the run is saved and goes on the next time
        about = {"arm": self.arm, "seed": self.cfg.train.seed, "lr": self.cfg.train.lr}
        if result.reason == "guard":  # it would diverge again, so this counts as finished
            return {**about, "failed": result.message}
        trained = time.perf_counter()
        found = evaluate_run(self.folder, self.cfg, dataset)
        return {
            **about,
            "failed": None,
            "tokens": result.tokens,
            **evaluation_data(found),
            "curve": learning_curve(self.folder),
            "balance": balance_curve(self.folder),
            "train_seconds": trained - begun,
            "evaluation_seconds": time.perf_counter() - trained,
        }


def evaluate_run(run: Path, cfg: RunConfig, dataset: Dataset) -> Evaluation:
    """Measure a run's newest checkpoint on all held-out documents."""
    device = pick_device(cfg.train.device)
    model, _ = load_model(run, device=device)
    autocast = cfg.train.dtype == "bf16_autocast"
    precision = torch.autocast(device.type, torch.bfloat16) if autocast else None
    return evaluate(model, dataset, seq_len=cfg.data.seq_len, precision=precision)


def evaluation_data(found: Evaluation) -> Data:
    """Held-out losses as JSON, with the sums of every document for a bootstrap over them."""
    documents = {
        domain: {"nats": sums.nats.tolist(), "units": sums.units.tolist()}
        for domain, sums in found.documents.items()
    }
    return {
        "val_bpb": found.mean,
        "by_domain": found.by_domain,
        "symbols": found.symbols,
        "documents": documents,
    }


def learning_curve(run: Path) -> Data:
    """What a run folder recorded on the way.

    ``tokens`` and ``bpb``: held-out evaluations (``train.eval_bytes`` of each domain);
    ``train_tokens`` and ``train_bpb``: the training loss, averaged over equal stretches.
    """
    held_out = [line for line in read_lines(run / "eval.jsonl") if line["val_bpb"] is not None]
    parts = _stretches(run, "bpb")
    return {
        "tokens": [line["tokens"] for line in held_out],
        "bpb": [line["val_bpb"] for line in held_out],
        "train_tokens": [part[-1]["tokens"] for part in parts],
        "train_bpb": [fmean(line["bpb"] for line in part) for part in parts],
    }


def balance_curve(run: Path) -> Data:
    """How evenly a run used its experts, averaged likewise; ``{}`` for one without experts."""
    parts = _stretches(run, "max_violation")
    if not parts:
        return {}
    names = ("max_violation", "dead_experts", "load_entropy")
    means = {name: [fmean(line[name] for line in part) for part in parts] for name in names}
    return {"tokens": [part[-1]["tokens"] for part in parts], **means}


def _stretches(run: Path, key: str) -> list[list[Data]]:
    """The recorded steps that have a figure, in at most ``CURVE_POINTS`` stretches."""
    steps = [line for line in read_lines(run / "metrics.jsonl") if line.get(key) is not None]
    stretch = max(-(-len(steps) // CURVE_POINTS), 1)
    return [steps[at : at + stretch] for at in range(0, len(steps), stretch)]


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """Apply probes to a trained run. One that fails says so in its place; the others go on."""

    arm: str
    cfg: RunConfig
    folder: Path
    file: Path
    key: str
    probes: tuple[str, ...]
    threads: int

    def run(self) -> Data:
        dataset = open_dataset(self.cfg.data)
        model, _ = load_model(self.folder, device=pick_device(self.cfg.train.device))
        context = Context(seq_len=self.cfg.data.seq_len)
        found: Data = {}
        with threads(self.threads):
            for name in self.probes:
                try:
                    found[name] = PROBES[name].run(model.eval(), dataset, context)
                except Exception as error:
                    found[name] = {"failed": reason(error)}
        return {"arm": self.arm, "probes": found}


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Within it, torch uses ``n`` threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class SpeedTask:
    """Time an arm's training step, and see how much memory it takes; nothing is kept of the run.

    Args:
        cfg: of a run with few steps (:func:`only_steps`).
        threads: of the CPU.
    """

    arm: str
    cfg: RunConfig
    file: Path
    key: str
    threads: int

    def run(self) -> Data:
        with threads(self.threads), TemporaryDirectory(prefix="fathom-speed-") as folder:
            return {**self._measure(Path(folder)), "threads": self.threads}

    def _measure(self, folder: Path) -> Data:
        """The first run loads and allocates what all later ones use; the second is measured."""
        _finish(only_steps(self.cfg, 1), folder / "first")
        memory = PeakMemory(pick_device(self.cfg.train.device))
        _finish(self.cfg, folder / "timed")
        peak = memory.bytes()
        lines = read_lines(folder / "timed" / "metrics.jsonl")[1:]
        speed = median(line["tokens_per_second"] for line in lines)
        return {
            "tokens_per_second": speed,
            "step_seconds": self.cfg.train.tokens_per_step / speed,
            "peak_memory_bytes": peak,
        }


def _finish(cfg: RunConfig, folder: Path) -> None:
    if train(cfg, folder).reason == "interrupted":
        raise KeyboardInterrupt


def only_steps(cfg: RunConfig, timed: int) -> RunConfig:
    """The same training, with so many steps and one before them, and nothing in between."""
    steps = timed + 1
    alone = replace(
        cfg.train,
        steps=steps,
        warmup_steps=0,
        ramp_from_tokens=None,
        ramp_steps=0,
        save_every=steps,
        eval_every=0,
        sample_every=0,
    )
    return replace(cfg, train=alone)


class PeakMemory:
    """The most memory used from here on: on a GPU by tensors, else by the process beyond the start.

    Linux can forget the old peak of a process, and glibc give back what earlier work left unused;
    elsewhere ``bytes`` is the whole process's peak, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        gc.collect()
        with suppress(OSError, AttributeError, LookupError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again
            self._before = _proc_status("VmRSS")

    def bytes(self) -> int | None:
        if self._before is None:
            return memory_bytes(self._device)
        return _proc_status("VmHWM") - self._before


def _proc_status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise LookupError(name)
    return int(found[1]) * 1024
