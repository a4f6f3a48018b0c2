"""A run from its first step to its last: ``Trainer.run`` steps, evaluates, saves, heeds the guards.

A run is a folder: config.toml, metrics.jsonl, eval.jsonl, env.json, checkpoints/. ``train`` begins
it, or goes on with it from its newest checkpoint, by itself. The step is in ``step.py``.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fathom.convert.run_folder import CONFIG, committed, newest, remove, step_of
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder
from fathom.parallel import ALONE, Layout, started
from fathom.parallel.step import in_step
from fathom.settings import ConfigError, to_toml
from fathom.train import checkpoint
from fathom.train.config import RunConfig
from fathom.train.device import compile_blocks, environment, pick_device, reproducible, uncompiled
from fathom.train.evaluate import Evaluation, evaluate
from fathom.train.folder import check_disk, check_folder, locked
from fathom.train.guards import MAX_NOT_FINITE, MAX_ROLLBACKS
from fathom.train.journal import Journal
from fathom.train.memory import explained
from fathom.train.metrics import replace_text
from fathom.train.progress import Reporter
from fathom.train.saver import Saver
from fathom.train.schedule import rows_at
from fathom.train.step import Learner
from fathom.train.stop import StopSignals
from fathom.train.watchdog import Watchdog

Reason = Literal["done", "interrupted", "guard"]
EXIT_CODES: dict[Reason, int] = {"done": 0, "interrupted": 75, "guard": 4}
Sampler = Callable[[Decoder, Tokenizer], str]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        reason: ``done``: all steps; ``interrupted``: asked to stop, saved; ``guard``: diverged.
        step: steps done.
        tokens: tokens read.
        evaluation: the newest one of the run, or None.
        message: one sentence: what happened, and how to go on.
    """

    reason: Reason
    step: int
    tokens: int
    evaluation: Evaluation | None
    message: str

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.reason]


def train(
    cfg: RunConfig,
    out: Path,
    *,
    dataset: Dataset | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] | None = None,
    sample: Sampler | None = None,
    strict: bool = False,
    allow_change: Sequence[str] = (),
) -> TrainResult:
    """Train to ``cfg.train.steps`` in the run folder ``out``, going on from what is there.

    Args:
        dataset: opened already; None: open ``cfg.data``.
        reporter: told of every step; None: nobody is.
        should_stop: asked after every step; None: Ctrl-C, SIGTERM and SIGUSR1 stop.
        sample: writes a text with the model, every ``train.sample_every`` steps.
        strict: a damaged newest checkpoint is an error; else the one before it is taken, aloud.
        allow_change: keys of the recipe that may differ from the folder's
            (``train/changes.py``).

    Raises:
        ValueError: a config that does not fit the data or the folder; nothing was written.
        CheckpointError: nothing usable in the folder, or in ``train.init_from``.
        OSError: the disk is full.
    """
    dataset = dataset or open_dataset(cfg.data)
    check_vocabulary(cfg, dataset)
    signals = StopSignals() if should_stop is None else nullcontext(should_stop)
    with ExitStack() as stack:
        layout = stack.enter_context(started(cfg.parallel, cfg.train.device))
        reporter = reporter if reporter and layout.leads else Reporter()

        def take_folder() -> str | None:
            check_folder(out)
            stack.enter_context(locked(out))
            start = checkpoint.starting_point(
                out, cfg, reporter.notice, strict=strict, allow_change=allow_change
            )
            return None if start is None else str(start)

        begin = layout.lead(take_folder)
        start = None if begin is None else Path(begin)
        stack.enter_context(reproducible(cfg.train.deterministic))
        stop = stack.enter_context(signals)
        device = pick_device(cfg.train.device)
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(explained(cfg, device))
        trainer = Trainer(
            cfg,
            out,
            dataset,
            device=device,
            layout=layout,
            reporter=reporter,
            sample=sample,
            start=start,
        )
        stack.enter_context(closing(trainer))
        stack.enter_context(trainer.watchdog)
        return trainer.run(stop)


def check_vocabulary(cfg: RunConfig, dataset: Dataset) -> None:
    """Refuse a model that lacks ids of the data."""
    if cfg.model.vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {cfg.model.vocab_size} and the data's tokenizer has "
            f"{dataset.vocab_size} ids: set model.vocab_size={dataset.vocab_size}"
        )


class Trainer:
    """A run in its folder, from the checkpoint ``start`` (None: the beginning) to its end."""

    def __init__(
        self,
        cfg: RunConfig,
        out: Path,
        dataset: Dataset,
        *,
        device: torch.device,
        layout: Layout = ALONE,
        reporter: Reporter,
        sample: Sampler | None,
        start: Path | None,
    ) -> None:
        self.cfg, self.out, self.dataset = cfg, out, dataset
        self.layout, self.reporter, self.sample = layout, reporter, sample
        self.learner = Learner(cfg, dataset, device=device, layout=layout)
        self.saver = Saver(out, background=cfg.train.async_save, ranks=layout.ranks)
        self.watchdog = Watchdog(
            cfg.train.hang_seconds, who=f"rank {layout.rank}: " if layout.world > 1 else ""
        )
        self.learner.load(start)
        self.last_saved = self.progress.step if start else None
        self.room_is_short = False
        parts, who = self.learner.parts, {"layout": layout, "reporter": reporter}
        self.journal = Journal(cfg, out, parts, device=device, **who)
        layout.lead(self.describe)
        self.journal.read_back()

    @property
    def progress(self) -> checkpoint.Progress:
        return self.learner.progress

    def run(self, stop: Callable[[], bool]) -> TrainResult:
        """Step until all is done, ``stop()`` says so, or a guard does."""
        cfg = self.cfg.train
        total = sum(rows_at(self.cfg, step) for step in range(cfg.steps)) * self.cfg.data.seq_len
        self.reporter.start(step=self.progress.step, steps=cfg.steps, tokens=total)
        if self.progress.step < cfg.steps:
            self.speed_up()
        self.journal.clock = time.perf_counter()
        while self.progress.step < cfg.steps:
            self.step()
            stopping = self.layout.any(stop())
            if stopping or any(map(self.due, (cfg.save_every, cfg.eval_every, cfg.sample_every))):
                self.journal.flush()
            if trouble := self.trouble():
                return self.result("guard", trouble)
            if self.learner.guard.persists(self.progress.step):
                if trouble := self.roll_back():
                    return self.result("guard", trouble)
                continue
            self.look_around(saving=stopping)
            if stopping and self.progress.step < cfg.steps:
                return self.result("interrupted")
        return self.result("done")

    def speed_up(self) -> None:
        """Compile and record what is asked for; where that cannot be had, say so and go on."""
        cfg, learner, notice = self.cfg.train, self.learner, self.reporter.notice
        if cfg.compile:
            compile_blocks(learner.model, learner.warm_up, notice)
        if not cfg.cuda_graph:
            return
        reason = "there is no GPU" if learner.device.type != "cuda" else ""
        try:
            if not reason:
                learner.record()
        except RuntimeError as error:  # some operation waits for the device, or is not for graphs
            learner.graphs, reason = None, str(error).strip().splitlines()[0]
            learner.model.zero_grad(set_to_none=True)
        if reason:
            notice(f"train.cuda_graph=true cannot be had here ({reason}); going on without it")

    def step(self) -> None:
        """One step of training, and a look at the save that may be under way."""
        self.watchdog.begin(self.progress.step + 1)
        self.journal.add(self.learner.step())
        self.watchdog.end()
        self.saved()

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and after the last, happens now."""
        step = self.progress.step
        return every > 0 and (step % every == 0 or step == self.cfg.train.steps)

    def look_around(self, *, saving: bool) -> None:
        """Evaluate, write a sample and save, each if it is due. Their time is nobody's speed."""
        cfg, model = self.cfg.train, self.learner.model
        with uncompiled(model):
            if self.due(cfg.eval_every):
                self.evaluate()
            if self.sample is not None and self.due(cfg.sample_every):
                with in_step(model, self.layout):
                    text = self.sample(model, self.dataset.tokenizer)
                self.reporter.sample(self.progress.step, text)
        if saving or self.due(cfg.save_every):
            self.save()
        self.journal.clock = time.perf_counter()

    def evaluate(self) -> None:
        """Measure the held-out losses and write them down."""
        result = evaluate(
            self.learner.model,
            self.dataset,
            seq_len=self.cfg.data.seq_len,
            batch_size=self.learner.rows,
            max_bytes=self.cfg.train.eval_bytes,
            precision=self.learner.precision(),
            layout=self.layout,
        )
        self.journal.evaluated(result)

    # Saving.

    def save(self) -> None:
        """Commit a checkpoint, after all that was recorded up to it."""
        if self.last_saved == self.progress.step:
            return
        self.saved(waiting=True)
        self.journal.sync()
        taken = self.learner.state()
        self.check_room(taken)
        self.saver.start(taken)
        self.last_saved = self.progress.step
        self.saved()

    def saved(self, *, waiting: bool = False) -> None:
        """Tell of the checkpoint that was being written, if it is done; its error ends the run."""
        folder = self.saver.ended(waiting=waiting)
        if folder is not None:
            self.reporter.saved(folder)

    def check_room(self, taken: checkpoint.Snapshot) -> None:
        """Refuse to save what does not fit, and say once when room is short."""
        warning = check_disk(self.out, taken.num_bytes, self.cfg.train.keep)
        if warning and not self.room_is_short:
            self.reporter.notice(warning)
        self.room_is_short = warning is not None

    # When the guards have spoken.

    def trouble(self) -> str | None:
        """Why a guard must stop the run now, or None."""
        if self.journal.fault is not None:
            return (
                f"step {self.journal.fault}, computed twice, gave other gradients: memory or "
                "processor of this machine err; go on elsewhere"
            )
        if self.progress.skipped >= MAX_NOT_FINITE:
            return (
                f"loss or gradients were not finite {MAX_NOT_FINITE} steps in a row; try a lower "
                "train.lr, a longer train.warmup_steps or train.dtype=float32"
            )
        return None

    def roll_back(self) -> str | None:
        """Back to the newest checkpoint before the spikes, then on with the data after them.

        Returns why it cannot be, or None.
        """
        self.journal.flush()
        self.saved(waiting=True)
        guard, at = self.learner.guard, self.progress.step
        first, rollbacks = guard.spikes[0], guard.rollbacks
        back = self.layout.lead(self.forget) if rollbacks < MAX_ROLLBACKS else None
        if back is None:
            return (
                f"spikes went on from step {first}, after {rollbacks} returns to an earlier "
                "checkpoint; try a lower train.lr, or look at the data"
            )
        self.learner.return_to(Path(back))
        guard.spikes, guard.rollbacks = [], rollbacks + 1
        self.last_saved = self.progress.step
        self.journal.read_back()
        self.reporter.notice(
            f"spikes from step {first} on: back from step {at} to {self.last_saved}, leaving out "
            f"the data read since ({rollbacks + 1} of {MAX_ROLLBACKS} times)"
        )
        return None

    def forget(self) -> str | None:
        """Drop records and checkpoints after the newest one before the spikes; its folder."""
        first = self.learner.guard.spikes[0]
        back = newest(self.out, before=first, warn=self.reporter.notice)
        if back is None:
            return None
        for folder in committed(self.out):
            if step_of(folder) > step_of(back):
                remove(folder)
        self.journal.rewind(step_of(back))
        return str(back)

    # The folder, at the beginning and at the end.

    def describe(self) -> None:
        """Write what describes the run, and open its records at the present step: rank 0 does."""
        self.check_room(self.learner.state())
        replace_text(self.out / CONFIG, to_toml(self.cfg))
        about = json.dumps(environment(self.learner.device), indent=1)
        replace_text(self.out / "env.json", about + "\n")
        self.journal.open()

    def result(self, reason: Reason, trouble: str = "") -> TrainResult:
        """How the run ended, with the sentence that says how to go on."""
        self.saved(waiting=True)
        done, steps, out = self.progress.step, self.cfg.train.steps, self.out
        again = f"fathom train {out / CONFIG} --out {out}"
        saved = committed(out)
        message = {
            "done": f"trained {done} steps into {out}; go on with a higher train.steps",
            "interrupted": f"stopped after step {done} of {steps}, saved; go on with: {again}",
            "guard": f"stopped at step {done} of {steps}: {trouble}; "
            + (f"the newest checkpoint is {saved[-1]}" if saved else "nothing was saved"),
        }[reason]
        evaluation = self.journal.last_evaluation
        return TrainResult(reason, done, self.progress.tokens, evaluation, message)

    def close(self) -> None:
        """Let go of files and threads."""
        self.saver.close()
        self.learner.loader.close()
        self.journal.close()
        self.reporter.close()
