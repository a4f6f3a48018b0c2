"""What a run writes down: a line per step, one step late, so that nothing waits for a GPU.

The verdicts of the guards arrive with the figures. Here they are counted and said aloud.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fathom.parallel import Layout
from fathom.sizing.count import flops_per_token
from fathom.train.checkpoint import Parts
from fathom.train.config import RunConfig
from fathom.train.device import memory_bytes, peak_flops
from fathom.train.evaluate import Evaluation, last_evaluation
from fathom.train.guards import ExpertWatch
from fathom.train.metrics import Figures, JsonLines, NoLines, Record, routing_figures
from fathom.train.progress import Reporter
from fathom.train.step import Done

METRICS, EVALUATIONS = "metrics.jsonl", "eval.jsonl"


class Journal:
    """The records of a run, from step ``parts.progress.step`` on.

    Attributes:
        clock: when the last step ended, or what came after it.
        fault: a step that was not the same when computed twice.
        last_evaluation: the newest of the run, or None.
    """

    def __init__(
        self,
        cfg: RunConfig,
        out: Path,
        parts: Parts,
        *,
        device: torch.device,
        layout: Layout,
        reporter: Reporter,
    ) -> None:
        self.cfg, self.out, self.parts = cfg, out, parts
        self.device, self.layout, self.reporter = device, layout, reporter
        self.metrics = self.evaluations = NoLines()  # unless open() is called: rank 0's work
        self.experts = ExpertWatch([name for name, _ in parts.model.moe_layers()])
        self.flops_per_token = 3 * flops_per_token(cfg.model, cfg.data.seq_len)
        self.peak_flops = peak_flops(device)
        self.fault: int | None = None
        self.last_evaluation: Evaluation | None = None
        self.pending: tuple[Record, Figures] | None = None
        self.clock = time.perf_counter()

    def open(self) -> None:
        """Begin to write; what is there of later steps is removed."""
        upto = self.parts.progress.step
        self.metrics = JsonLines(self.out / METRICS, upto=upto)
        self.evaluations = JsonLines(self.out / EVALUATIONS, upto=upto)

    def read_back(self) -> None:
        """Learn the newest evaluation from the folder."""
        self.last_evaluation = last_evaluation(self.out / EVALUATIONS)

    def add(self, done: Done) -> None:
        """Send a step's figures on their way, and write down those of the step before."""
        now = time.perf_counter()
        speed, self.clock = done.tokens / (now - self.clock), now
        record: Record = {
            "step": self.parts.progress.step,
            "tokens": self.parts.progress.tokens,
            "loss": None,
            "bpb": done.bits_per_nat,  # times the loss when that is read
            "lr": done.lr,
            "grad_norm": None,
            "tokens_per_second": speed,
            "memory_bytes": memory_bytes(self.device),
        }
        if self.peak_flops:
            record["mfu"] = self.flops_per_token * speed / (self.peak_flops * self.layout.world)
        figures = Figures({**done.sums.losses, **done.verdict}, done.sums.vectors())
        self.flush()
        self.pending = record, figures

    def flush(self) -> None:
        """Write down the last step, whose figures have arrived by now."""
        if self.pending is None:
            return
        (record, figures), self.pending = self.pending, None
        scalars, counts_and_means = figures.read()
        not_finite, spike = scalars.pop("not_finite") > 0, scalars.pop("spike") > 0
        if scalars.pop("differs", 0.0) > 0:
            self.fault = record["step"]
        record |= scalars
        record["bpb"] *= record["loss"]
        if counts_and_means:
            layers = len(counts_and_means) // 2
            counts, means = counts_and_means[:layers], counts_and_means[layers:]
            record |= self._routing(record["step"], counts, [mean.tolist() for mean in means])
        if not_finite or spike:
            record |= {"skipped": True, "spike": True} if spike else {"skipped": True}
            self._heed(record, spike=spike)
        progress = self.parts.progress
        progress.skipped = progress.skipped + 1 if not_finite else 0
        self.metrics.write(record)
        self.reporter.step(record)

    def _routing(
        self, step: int, counts: Sequence[torch.Tensor], means: Sequence[Sequence[float]]
    ) -> Record:
        """How the experts were used, for the record; what is odd about it is said."""
        for sentence in self.experts.add(counts):
            self.reporter.notice(f"step {step}: {sentence}")
        log_load, ranks = self.cfg.train.log_load, self.layout.cfg.ep
        return routing_figures(counts, means, log_load=log_load, ranks=ranks)

    def _heed(self, record: Record, *, spike: bool) -> None:
        """A step changed nothing: count it, and say so."""
        self.parts.progress.skipped_in_all += 1
        if spike:
            self.parts.guard.heard(record["step"])
        why = "it spiked" if spike else "it is not finite"
        figures = f"loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"
        self.reporter.notice(f"step {record['step']} changed nothing, {why}: {figures}")

    def evaluated(self, result: Evaluation) -> None:
        """Write down the held-out losses."""
        place = {"step": self.parts.progress.step, "tokens": self.parts.progress.tokens}
        self.evaluations.write({**place, **result.record()})
        self.last_evaluation = result
        self.reporter.evaluation(place["step"], result)

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        self.metrics.sync()
        self.evaluations.sync()

    def rewind(self, upto: int) -> None:
        """Remove what was written of later steps."""
        self.metrics.rewind(upto)
        self.evaluations.rewind(upto)

    def close(self) -> None:
        """Let go of the files."""
        self.metrics.close()
        self.evaluations.close()
