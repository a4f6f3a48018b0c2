"""Telling people how a run goes: a live bar on a terminal, one line per N steps anywhere else."""

import sys
from collections import deque
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fathom.train.evaluate import Evaluation
from fathom.train.metrics import Record


class Reporter:
    """Is told what happens, and says nothing: the base of those that do."""

    def start(self, *, step: int, steps: int, tokens: int) -> None:
        """Training begins after ``step`` of ``steps`` steps; the whole run reads ``tokens``."""

    def step(self, record: Record) -> None:
        """A step's line of ``metrics.jsonl``."""

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Held-out losses after ``step``."""

    def sample(self, step: int, text: str) -> None:
        """What the model wrote after ``step``."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint has been committed."""

    def notice(self, sentence: str) -> None:
        """Something a person should know."""

    def close(self) -> None:
        """Training has ended, however."""


class Lines(Reporter):
    """One line per ``every`` steps, for logs and pipes.

    Args:
        every: steps between lines; the last step always has one.
        stream: None: standard error.
    """

    def __init__(self, every: int = 10, stream: TextIO | None = None) -> None:
        self.every = every
        self.console = Console(file=stream or sys.stderr, markup=False, highlight=False)
        self.steps = self.tokens = 0
        self.paces: deque[float] = deque(maxlen=10)  # seconds per token of the last steps

    def start(self, *, step: int, steps: int, tokens: int) -> None:
        self.steps, self.tokens = steps, tokens
        if step:
            self.say(f"going on after step {step} of {steps}")

    def step(self, record: Record) -> None:
        text = self.describe(record)
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            self.say(f"step {record['step']}/{self.steps}  {text}")

    def describe(self, record: Record) -> str:
        """A step's figures, and the time that is left at the pace of the last ten steps."""
        self.paces.append(1 / record["tokens_per_second"])
        pace = sum(self.paces) / len(self.paces)
        left = duration((self.tokens - record["tokens"]) * pace)
        return f"{summary(record)}  {1 / pace:,.0f} tokens/s  {left} left"

    def evaluation(self, step: int, result: Evaluation) -> None:
        by_domain = {**result.by_domain, **result.symbols}
        parts = "  ".join(f"{domain} {bits:.4f}" for domain, bits in by_domain.items())
        mean = "" if result.mean is None else f"{result.mean:.4f} bits per byte  "
        self.say(f"step {step}  held out: {mean}({parts})")

    def sample(self, step: int, text: str) -> None:
        self.say(f"step {step}  sample: {printable(text)}")

    def saved(self, checkpoint: Path) -> None:
        self.say(f"saved {checkpoint}")

    def notice(self, sentence: str) -> None:
        self.say(sentence)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


class Bar(Lines):
    """A live bar with loss, speed and the time that is left."""

    def __init__(self, every: int = 10, stream: TextIO | None = None) -> None:
        super().__init__(every, stream)
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}  {task.fields[text]}"))
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task("", total=None, text="")

    def start(self, *, step: int, steps: int, tokens: int) -> None:
        super().start(step=step, steps=steps, tokens=tokens)
        self.bar.update(self.task, total=steps, completed=step)
        self.bar.start()

    def step(self, record: Record) -> None:
        self.bar.update(self.task, completed=record["step"], text=self.describe(record))

    def close(self) -> None:
        self.bar.stop()


def reporter(every: int, stream: TextIO | None = None) -> Reporter:
    """The bar on a terminal, else the lines."""
    terminal: TextIO = stream or sys.stderr
    return Bar(every, terminal) if terminal.isatty() else Lines(every, terminal)


def summary(record: Record) -> str:
    """A step's figures, in one line."""
    parts = [f"loss {record['loss']:.4f}", f"{record['bpb']:.3f} bits/byte"]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record.get("max_violation") is not None:
        parts.append(f"max violation {record['max_violation']:.2f}")
    if record.get("skipped"):
        parts.append("skipped: a spike" if record.get("spike") else "skipped: not finite")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m 20s, 5h 10m."""
    whole = round(max(seconds, 0))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def printable(text: str) -> str:
    """A model's text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
