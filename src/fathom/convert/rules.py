"""Rules between our tensors and another project's: each knows both directions.

A family (``llama.py``, ``deepseek.py``) is a list of rules, and the list is its documentation. A
rule names one tensor of ours and the one or many of theirs that fill it, part by part. A part is a
view, so a stacked tensor is filled in place and is never held a second time.

Shapes: E experts, O rows (outputs), I columns (inputs).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Rule(ABC):
    """One tensor of ours, and how it is read from and written as theirs."""

    ours: str

    @property
    @abstractmethod
    def theirs(self) -> Sequence[str]:
        """Their names, in the order of ``parts``."""

    def parts(self, ours: Tensor) -> Sequence[Tensor]:
        """The views of ours that theirs fill, of the same shapes as theirs."""
        return (ours,)

    def load(self, theirs: Tensor) -> Tensor:
        """One of theirs, arranged as its part."""
        return theirs

    def save(self, part: Tensor) -> Tensor:
        """A part, arranged as theirs: the inverse of ``load``."""
        return part


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name."""

    ours: str
    name: str

    @property
    def theirs(self) -> Sequence[str]:
        return (self.name,)


@dataclass(frozen=True)
class Deinterleave(Rename):
    """RoPE rows: theirs turn adjacent pairs, ours turn halves.

    Rows come in heads of ``head_width``; the last ``rope_width`` rows of each are reordered, even
    ones first. Scores do not change, for queries and keys are reordered alike.
    """

    head_width: int
    rope_width: int

    def _order(self, rows: int) -> Tensor:
        pairs = torch.arange(self.rope_width).view(-1, 2).T.flatten()
        kept = torch.arange(self.head_width - self.rope_width)
        head = torch.cat([kept, pairs + len(kept)])
        starts = torch.arange(0, rows, self.head_width)
        return (starts[:, None] + head).flatten()

    def load(self, theirs: Tensor) -> Tensor:
        return theirs[self._order(len(theirs))]

    def save(self, part: Tensor) -> Tensor:
        return part[self._order(len(part)).argsort()]


@dataclass(frozen=True)
class StackExperts(Rule):
    """One tensor ``[E, ...]`` from each expert's own; several parts are joined along the rows.

    ``names`` holds, for each expert, the names of its parts (``gate_proj``, ``up_proj``), which
    have equally many rows.
    """

    ours: str
    names: tuple[tuple[str, ...], ...]

    @property
    def theirs(self) -> Sequence[str]:
        return tuple(name for expert in self.names for name in expert)

    def parts(self, ours: Tensor) -> Sequence[Tensor]:
        count = len(self.names[0])
        return tuple(part for expert in ours for part in expert.chunk(count))


@dataclass(frozen=True)
class Copy(Rename):
    """A second copy of a tensor that another rule fills: compared when read, and optional.

    Args:
        written: whether saving writes the copy too.
    """

    written: bool


def filled_by(rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> dict[str, tuple[Rule, Tensor]]:
    """For each of their names the rule, and the view of ours that it fills."""
    return {
        name: (rule, part)
        for rule in rules
        for name, part in zip(rule.theirs, rule.parts(ours[rule.ours]), strict=True)
    }
