"""The training loop. ``Trainer.step`` reads as the algorithm; what surrounds it is one call each.

A run is a folder: config.toml, metrics.jsonl, eval.jsonl, env.json, checkpoints/. ``train`` begins
it, or goes on with it from its newest checkpoint, by itself.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fathom.convert.run_folder import CONFIG, committed, newest, remove, step_of
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.loader import IGNORE, Batch, Loader
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder, Losses
from fathom.parallel import ALONE, Layout, build, places, started
from fathom.parallel.mesh import local
from fathom.parallel.step import accumulate, in_step
from fathom.settings import ConfigError, to_toml
from fathom.sizing.count import flops_per_token
from fathom.train import checkpoint
from fathom.train.config import RunConfig
from fathom.train.device import (
    compile_blocks,
    environment,
    memory_bytes,
    peak_flops,
    pick_device,
    reproducible,
    uncompiled,
)
from fathom.train.evaluate import Evaluation, evaluate, last_evaluation
from fathom.train.folder import check_disk, check_folder, locked
from fathom.train.guards import MAX_NOT_FINITE, MAX_ROLLBACKS, ExpertWatch, SpikeGuard, bits
from fathom.train.memory import explained
from fathom.train.metrics import (
    Figures,
    JsonLines,
    NoLines,
    Record,
    Sums,
    replace_text,
    routing_figures,
)
from fathom.train.optim import Optimizer, clip_gradients, freeze_all_but
from fathom.train.progress import Reporter
from fathom.train.saver import Saver
from fathom.train.schedule import lr_factor, rows_at
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
        self.cfg, self.out, self.dataset, self.device = cfg, out, dataset, device
        self.layout, self.reporter, self.sample = layout, reporter, sample
        torch.manual_seed(cfg.train.seed)
        dtype = torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32
        self.model = build(cfg.model, layout, seed=cfg.train.seed, device=device, dtype=dtype)
        self.model.checkpoint_blocks = cfg.train.activation_checkpointing
        freeze_all_but(self.model, cfg.train.only)
        optimizer = Optimizer(self.model, cfg.train, layout)
        self.guard = SpikeGuard(cfg.train.spike_sigmas, device)
        self.parts = checkpoint.Parts(
            self.model, optimizer, self.guard, place=places(self.model, layout)
        )
        self.experts = ExpertWatch([name for name, _ in self.model.moe_layers()])
        self.saver = Saver(out, background=cfg.train.async_save, ranks=layout.ranks)
        self.watchdog = Watchdog(
            cfg.train.hang_seconds, who=f"rank {layout.rank}: " if layout.world > 1 else ""
        )
        self.fault: int | None = None  # a step that was not the same when computed twice
        self.rows = cfg.train.micro_batch_size or rows_at(cfg, 0)
        self.loader = Loader(
            dataset,
            cfg.data,
            batch_size=self.rows,
            seed=cfg.train.seed,
            rank=layout.rank,
            world=layout.world,
        )
        self.load(start)
        self.last_saved = self.progress.step if start else None
        self.open_folder()
        sizes = dataset.tokenizer.token_bytes + dataset.tokenizer.is_symbol
        self.token_sizes = torch.from_numpy(sizes)  # bytes; a symbol counts as one
        self.flops_per_token = 3 * flops_per_token(cfg.model, cfg.data.seq_len)
        self.peak_flops = peak_flops(device)
        self.pending: tuple[Record, Figures] | None = None
        self.clock = time.perf_counter()

    @property
    def progress(self) -> checkpoint.Progress:
        return self.parts.progress

    def step(self) -> None:
        """One optimizer step."""
        cfg = self.cfg.train
        lr = cfg.lr * lr_factor(cfg, self.progress.step)
        batches = self.batches()
        n_targets, n_bytes = self.count(batches)
        sums = self.gradients(batches, n_targets)
        differs = self.repeat(batches, n_targets)
        sums.over_ranks(self.layout)
        grad_norm = clip_gradients(self.model, cfg.grad_clip, self.layout)
        verdict = self.guard.judge(sums.losses["total_loss"], grad_norm)
        skip = verdict["not_finite"] + verdict["spike"]  # never both
        self.parts.optimizer.step(lr, skip)
        if not cfg.only:
            self.model.update_expert_bias([counts * (skip == 0) for counts in sums.counts])
        self.model.zero_grad(set_to_none=True)
        per_nat = n_targets / (math.log(2) * max(n_bytes, 1))
        self.record(per_nat, lr, sums, {"grad_norm": grad_norm, **verdict, **differs})

    def gradients(self, batches: Sequence[Batch], n_targets: int) -> Sums:
        """Forward and backward of every micro-batch, whose gradients add up."""
        sums, share = Sums(), 1 / (len(batches) * self.layout.world)
        progress = self.progress.step / self.cfg.train.steps
        for batch in batches:
            accumulate(self.model, self.layout, last=batch is batches[-1])
            losses = self.losses(batch, progress=progress, denominator=n_targets, share=share)
            losses.total.backward()
            sums.add(losses)
        return sums

    def repeat(self, batches: Sequence[Batch], n_targets: int) -> dict[str, Tensor]:
        """If it is due, ``differs``: above 0 on the device if the same step gave other bits."""
        every = self.cfg.train.repeat_every
        if not every or (self.progress.step + 1) % every:
            return {}
        first = self.gradient_bits()
        self.model.zero_grad(set_to_none=True)
        self.gradients(batches, n_targets)
        return {"differs": self.layout.sum((self.gradient_bits() != first).any().float())}

    def gradient_bits(self) -> Tensor:
        """See :func:`fathom.train.guards.bits`."""
        return bits([local(p.grad) for p in self.model.parameters() if p.grad is not None])

    def batches(self) -> list[Batch]:
        """The micro-batches of the next step."""
        rows = rows_at(self.cfg, self.progress.step)
        micro = self.cfg.train.micro_batch_size or rows
        if micro != self.rows:
            self.loader.set_batch_size(micro)
            self.rows = micro
        return [self.loader.next() for _ in range(rows // micro)]

    def count(self, batches: Sequence[Batch]) -> list[int]:
        """Targets of all ranks in these batches, and the bytes that they stand for."""
        targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in batches])
        return self.layout.sum(
            torch.stack([torch.tensor(len(targets)), self.token_sizes[targets].sum()])
        ).tolist()

    def losses(
        self, batch: Batch, *, progress: float, denominator: int, share: float = 1.0
    ) -> Losses:
        """The forward pass of one micro-batch, which has ``share`` of the step's tokens."""
        inputs = [batch.tokens, batch.targets, batch.cu_seqlens]
        if self.device.type == "cuda":
            inputs = [tensor.pin_memory() for tensor in inputs]
        on_device = [tensor.to(self.device, non_blocking=True) for tensor in inputs]
        with self.precision():
            return self.model.loss(
                *on_device, progress=progress, denominator=denominator, share=share
            )

    def precision(self) -> AbstractContextManager[object]:
        """Autocast, if the run has it."""
        if self.cfg.train.dtype == "bf16_autocast":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def record(self, per_nat: float, lr: float, sums: Sums, guard: dict[str, Tensor]) -> None:
        """Count the step, send its figures on their way, write down those of the step before."""
        tokens = rows_at(self.cfg, self.progress.step) * self.cfg.data.seq_len
        self.progress.step += 1
        self.progress.tokens += tokens
        now = time.perf_counter()
        speed, self.clock = tokens / (now - self.clock), now
        record: Record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": None,
            "bpb": per_nat,  # times the loss when that is read
            "lr": lr,
            "grad_norm": None,
            "tokens_per_second": speed,
            "memory_bytes": memory_bytes(self.device),
        }
        if self.peak_flops:
            record["mfu"] = self.flops_per_token * speed / (self.peak_flops * self.layout.world)
        figures = Figures({**sums.losses, **guard}, sums.vectors())
        self.flush()
        self.pending = record, figures

    def flush(self) -> None:
        """Write down the last step, whose figures have arrived by now."""
        if self.pending is None:
            return
        (record, figures), self.pending = self.pending, None
        scalars, vectors = figures.read()
        not_finite, spike = scalars.pop("not_finite") > 0, scalars.pop("spike") > 0
        if scalars.pop("differs", 0.0) > 0:
            self.fault = record["step"]
        record |= scalars
        record["bpb"] *= record["loss"]
        if vectors:
            *counts, entropies = vectors
            record |= routing_figures(
                counts,
                entropies.tolist(),
                log_load=self.cfg.train.log_load,
                ranks=self.layout.cfg.ep,
            )
            for sentence in self.experts.add(counts):
                self.reporter.notice(f"step {record['step']}: {sentence}")
        if not_finite or spike:
            record |= {"skipped": True, "spike": True} if spike else {"skipped": True}
            self.heed(record, spike=spike)
        self.progress.skipped = self.progress.skipped + 1 if not_finite else 0
        self.metrics.write(record)
        self.reporter.step(record)

    def heed(self, record: Record, *, spike: bool) -> None:
        """A step changed nothing: count it, and say so."""
        self.progress.skipped_in_all += 1
        if spike:
            self.guard.heard(record["step"])
        why = "it spiked" if spike else "it is not finite"
        figures = f"loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"
        self.reporter.notice(f"step {record['step']} changed nothing, {why}: {figures}")

    # What surrounds the step.

    def run(self, stop: Callable[[], bool]) -> TrainResult:
        """Step until all is done, ``stop()`` says so, or the guard does."""
        cfg = self.cfg.train
        total = sum(rows_at(self.cfg, step) for step in range(cfg.steps)) * self.cfg.data.seq_len
        self.reporter.start(step=self.progress.step, steps=cfg.steps, tokens=total)
        if cfg.compile and self.progress.step < cfg.steps:
            compile_blocks(self.model, self.warm_up, self.reporter.notice)
        self.clock = time.perf_counter()
        while self.progress.step < cfg.steps:
            self.watchdog.begin(self.progress.step + 1)
            self.step()
            self.watchdog.end()
            self.saved()
            stopping = self.layout.any(stop())
            if stopping or any(map(self.due, (cfg.save_every, cfg.eval_every, cfg.sample_every))):
                self.flush()
            if trouble := self.trouble():
                return self.result("guard", trouble)
            if self.guard.persists(self.progress.step):
                if trouble := self.roll_back():
                    return self.result("guard", trouble)
                continue
            self.look_around(saving=stopping)
            if stopping and self.progress.step < cfg.steps:
                return self.result("interrupted")
        return self.result("done")

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and after the last, happens now."""
        step = self.progress.step
        return every > 0 and (step % every == 0 or step == self.cfg.train.steps)

    def look_around(self, *, saving: bool) -> None:
        """Evaluate, write a sample and save, each if it is due. Their time is nobody's speed."""
        cfg = self.cfg.train
        with uncompiled(self.model):
            if self.due(cfg.eval_every):
                self.evaluate()
            if self.sample is not None and self.due(cfg.sample_every):
                with in_step(self.model, self.layout):
                    text = self.sample(self.model, self.dataset.tokenizer)
                self.reporter.sample(self.progress.step, text)
        if saving or self.due(cfg.save_every):
            self.save()
        self.clock = time.perf_counter()

    def evaluate(self) -> None:
        """Measure the held-out losses and write them down."""
        result = evaluate(
            self.model,
            self.dataset,
            seq_len=self.cfg.data.seq_len,
            batch_size=self.rows,
            max_bytes=self.cfg.train.eval_bytes,
            precision=self.precision(),
            layout=self.layout,
        )
        place = {"step": self.progress.step, "tokens": self.progress.tokens}
        self.evaluations.write({**place, **result.record()})
        self.last_evaluation = result
        self.reporter.evaluation(self.progress.step, result)

    def save(self) -> None:
        """Commit a checkpoint, after all that was recorded up to it."""
        if self.last_saved == self.progress.step:
            return
        self.saved(waiting=True)
        self.metrics.sync()
        self.evaluations.sync()
        self.parts.loader = self.loader.state()
        taken = checkpoint.snapshot(self.cfg, self.parts, self.dataset.tokenizer)
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

    def trouble(self) -> str | None:
        """Why a guard must stop the run now, or None."""
        if self.fault is not None:
            return (
                f"step {self.fault}, computed twice, gave other gradients: memory or processor of "
                "this machine err; go on elsewhere"
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
        self.flush()
        self.saved(waiting=True)
        first, at, rollbacks = self.guard.spikes[0], self.progress.step, self.guard.rollbacks
        back = self.layout.lead(self.forget) if rollbacks < MAX_ROLLBACKS else None
        if back is None:
            return (
                f"spikes went on from step {first}, after {rollbacks} returns to an earlier "
                "checkpoint; try a lower train.lr, or look at the data"
            )
        ahead = self.loader.state()
        checkpoint.restore(Path(back), self.parts)
        self.loader.restore(ahead)
        self.guard.spikes, self.guard.rollbacks = [], rollbacks + 1
        self.last_saved = self.progress.step
        self.last_evaluation = last_evaluation(self.out / "eval.jsonl")
        self.reporter.notice(
            f"spikes from step {first} on: back from step {at} to {self.last_saved}, leaving out "
            f"the data read since ({rollbacks + 1} of {MAX_ROLLBACKS} times)"
        )
        return None

    def forget(self) -> str | None:
        """Drop records and checkpoints after the newest one before the spikes; its folder."""
        back = newest(self.out, before=self.guard.spikes[0], warn=self.reporter.notice)
        if back is None:
            return None
        for folder in committed(self.out):
            if step_of(folder) > step_of(back):
                remove(folder)
        self.metrics.rewind(step_of(back))
        self.evaluations.rewind(step_of(back))
        return str(back)

    def load(self, start: Path | None) -> None:
        """Take up the run where ``start`` left it, or begin it."""
        if start is not None:
            checkpoint.restore(start, self.parts)
            self.loader.restore(self.parts.loader)
        elif self.cfg.train.init_from is not None:
            checkpoint.init_from(Path(self.cfg.train.init_from), self.model, self.dataset.tokenizer)

    def open_folder(self) -> None:
        """Write what describes the run, and open its records at the present step."""
        self.metrics = self.evaluations = NoLines()
        self.room_is_short = False
        self.layout.lead(self.describe)
        self.last_evaluation = last_evaluation(self.out / "eval.jsonl")

    def describe(self) -> None:
        """The files of the folder that rank 0 writes."""
        self.check_room(checkpoint.snapshot(self.cfg, self.parts, self.dataset.tokenizer))
        replace_text(self.out / CONFIG, to_toml(self.cfg))
        replace_text(self.out / "env.json", json.dumps(environment(self.device), indent=1) + "\n")
        self.metrics = JsonLines(self.out / "metrics.jsonl", upto=self.progress.step)
        self.evaluations = JsonLines(self.out / "eval.jsonl", upto=self.progress.step)

    def warm_up(self) -> None:
        """One forward and backward pass of the next batch, which leaves no trace."""
        batch = self.loader.peek()
        self.losses(batch, progress=0.0, denominator=batch.targets.numel()).total.backward()
        self.model.zero_grad(set_to_none=True)

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
        return TrainResult(reason, done, self.progress.tokens, self.last_evaluation, message)

    def close(self) -> None:
        """Let go of files and threads."""
        self.saver.close()
        self.loader.close()
        self.metrics.close()
        self.evaluations.close()
        self.reporter.close()
