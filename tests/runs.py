"""What tests read of a run: its records, its files, what it told."""

from pathlib import Path

from fathom.train.metrics import Record, read_lines
from fathom.train.progress import Reporter

TIMINGS = {"tokens_per_second", "memory_bytes"}


class Notices(Reporter):
    """Remembers what people would have read."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def notice(self, sentence: str) -> None:
        self.heard.append(sentence)

    def sample(self, step: int, text: str) -> None:
        self.heard.append(f"{step}: {text}")


def records(run: Path) -> list[Record]:
    """The lines of ``metrics.jsonl``, timings apart."""
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}
