"""One step of training. ``Learner.step`` reads as the algorithm; what surrounds it is ``loop.py``.

Nothing in it waits for a GPU: figures stay on the device, and a step that must not count is undone
by a flag there (``guards.py``).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fathom.data.dataset import Dataset
from fathom.data.loader import IGNORE, Batch, Loader
from fathom.model import Losses
from fathom.parallel import ALONE, Layout, build, places
from fathom.parallel.mesh import local
from fathom.parallel.step import accumulate
from fathom.train import checkpoint
from fathom.train.config import RunConfig
from fathom.train.graph import GradientGraphs
from fathom.train.guards import SpikeGuard, bits
from fathom.train.metrics import Sums
from fathom.train.optim import Optimizer, clip_factor, freeze_all_but, gradient_norm
from fathom.train.schedule import lr_factor, rows_at


@dataclass(frozen=True)
class Done:
    """What a step that was done leaves behind; its figures are on the device.

    Args:
        tokens: that it read.
        lr: its learning rate.
        bits_per_nat: bits per byte of its text for each nat per token of its loss.
        sums: losses and routing.
        verdict: ``grad_norm``, ``not_finite``, ``spike`` and, if it was computed twice,
            ``differs``: scalars.
    """

    tokens: int
    lr: float
    bits_per_nat: float
    sums: Sums
    verdict: dict[str, Tensor]


class Learner:
    """A model, its optimizer and its data, which ``step`` changes; at the beginning of a run."""

    def __init__(
        self, cfg: RunConfig, dataset: Dataset, *, device: torch.device, layout: Layout = ALONE
    ) -> None:
        self.cfg, self.dataset, self.device, self.layout = cfg, dataset, device, layout
        torch.manual_seed(cfg.train.seed)
        dtype = torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32
        self.model = build(cfg.model, layout, seed=cfg.train.seed, device=device, dtype=dtype)
        self.model.checkpoint_blocks = cfg.train.activation_checkpointing
        freeze_all_but(self.model, cfg.train.only)
        self.optimizer = Optimizer(self.model, cfg.train, layout)
        self.guard = SpikeGuard(cfg.train.spike_sigmas, device)
        self.parts = checkpoint.Parts(
            self.model, self.optimizer, self.guard, place=places(self.model, layout)
        )
        self.rows = cfg.train.micro_batch_size or rows_at(cfg, 0)
        self.loader = Loader(
            dataset,
            cfg.data,
            batch_size=self.rows,
            seed=cfg.train.seed,
            rank=layout.rank,
            world=layout.world,
        )
        sizes = dataset.tokenizer.token_bytes + dataset.tokenizer.is_symbol
        self.token_sizes = torch.from_numpy(sizes)  # bytes; a symbol counts as one
        self.graphs: GradientGraphs | None = None

    @property
    def progress(self) -> checkpoint.Progress:
        return self.parts.progress

    def step(self) -> Done:
        """One optimizer step."""
        cfg = self.cfg.train
        lr = cfg.lr * lr_factor(cfg, self.progress.step)
        batches = self.batches()
        n_targets, n_bytes = self.count(batches)
        sums = self.gradients(batches, n_targets)
        differs = self.repeat(batches, n_targets)
        sums.over_ranks(self.layout)
        grad_norm = gradient_norm(self.model, self.layout)
        verdict = self.guard.judge(sums.losses["total_loss"], grad_norm)
        skip = verdict["not_finite"] + verdict["spike"]  # never both
        self.optimizer.step(lr, skip, clip_factor(grad_norm, cfg.grad_clip))
        if not cfg.only:
            self.model.update_expert_bias([counts * (skip == 0) for counts in sums.counts])
        self.model.zero_grad(set_to_none=True)
        tokens = rows_at(self.cfg, self.progress.step) * self.cfg.data.seq_len
        self.progress.step += 1
        self.progress.tokens += tokens
        bits_per_nat = n_targets / (math.log(2) * max(n_bytes, 1))
        return Done(tokens, lr, bits_per_nat, sums, {"grad_norm": grad_norm, **verdict, **differs})

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

    def gradients(self, batches: Sequence[Batch], n_targets: int) -> Sums:
        """Forward and backward of every micro-batch, whose gradients add up."""
        sums, share = Sums(), 1 / (len(batches) * self.layout.world)
        progress = self.progress.step / self.cfg.train.steps
        for batch in batches:
            accumulate(self.model, self.layout, last=batch is batches[-1])
            inputs = [*self.moved(batch), *sums.counts]
            if self.graphs is None:
                losses = self.backward(inputs, n_targets, progress, share)
            else:
                losses = self.graphs(
                    lambda inputs, count: self.backward(inputs, count, progress, share),
                    inputs,
                    n_targets,
                    kind=(share, self.model.phase(progress)),
                    first=batch is batches[0],
                )
            sums.add(losses)
        return sums

    def moved(self, batch: Batch) -> list[Tensor]:
        """Tokens, targets and borders on the device, without a wait."""
        inputs = [batch.tokens, batch.targets, batch.cu_seqlens]
        if self.device.type == "cuda":
            inputs = [tensor.pin_memory() for tensor in inputs]
        return [tensor.to(self.device, non_blocking=True) for tensor in inputs]

    def backward(
        self,
        inputs: Sequence[Tensor],
        denominator: int | Tensor,
        progress: float,
        share: float = 1.0,
    ) -> Losses:
        """Forward and backward of one micro-batch; the arguments are those of ``Decoder.loss``.

        ``inputs`` are tokens, targets, borders, and the experts' counts of the step before it.
        """
        losses = self.losses(inputs, denominator=denominator, progress=progress, share=share)
        losses.total.backward()
        return losses

    def losses(
        self,
        inputs: Sequence[Tensor],
        *,
        denominator: int | Tensor,
        progress: float,
        share: float,
    ) -> Losses:
        """The forward pass alone."""
        tokens_BT, targets_BT, cu_seqlens, *counts = inputs
        with self.precision():
            return self.model.loss(
                *(tokens_BT, targets_BT, cu_seqlens),
                progress=progress,
                denominator=denominator,
                share=share,
                counts_before=counts,
            )

    def precision(self) -> AbstractContextManager[object]:
        """Autocast, if the run has it."""
        if self.cfg.train.dtype == "bf16_autocast":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

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

    def warm_up(self) -> None:
        """One forward and backward pass of the next batch, which leaves no trace."""
        batch = self.loader.peek()
        self.backward(self.moved(batch), batch.targets.numel(), progress=0.0)
        self.model.zero_grad(set_to_none=True)

    def record(self) -> None:
        """From now on the gradients come from CUDA graphs; the first is recorded here."""
        micro, rows = self.cfg.train.micro_batch_size, rows_at(self.cfg, self.progress.step)
        add_up = (
            micro is not None and micro * self.cfg.data.seq_len < self.cfg.train.tokens_per_step
        )
        self.graphs = GradientGraphs(list(self.model.parameters()), add_up=add_up)
        batch = self.loader.peek()
        self.gradients([batch] * (rows // self.rows), batch.targets.numel())
        self.model.zero_grad(set_to_none=True)

    def load(self, start: Path | None) -> None:
        """Take up the run where the checkpoint ``start`` left it; None: begin it."""
        if start is not None:
            checkpoint.restore(start, self.parts)
            self.loader.restore(self.parts.loader)
        elif self.cfg.train.init_from is not None:
            checkpoint.init_from(Path(self.cfg.train.init_from), self.model, self.dataset.tokenizer)

    def return_to(self, back: Path) -> None:
        """Take up the run where a checkpoint left it, but go on with the data that is next now."""
        ahead = self.loader.state()
        checkpoint.restore(back, self.parts)
        self.loader.restore(ahead)

    def state(self) -> checkpoint.Snapshot:
        """All that the next step depends on."""
        self.parts.loader = self.loader.state()
        return checkpoint.snapshot(self.cfg, self.parts, self.dataset.tokenizer)
