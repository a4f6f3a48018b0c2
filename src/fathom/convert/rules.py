"""Rules between our tensors and another project's: each knows both directions.

A family (``llama.py``, ``deepseek.py``) is a list of rules, and the list is its documentation. A
rule names one tensor of ours and the one or many of theirs that it is made of.

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
        """Their names, in the order of ``load``'s and ``save``'s tensors."""

    @abstractmethod
    def load(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours from theirs."""

    @abstractmethod
    def save(self, tensor: Tensor) -> Sequence[Tensor]:
        """Theirs from ours."""


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name."""

    ours: str
    name: str

    @property
    def theirs(self) -> Sequence[str]:
        return (self.name,)

    def load(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def save(self, tensor: Tensor) -> Sequence[Tensor]:
        return (tensor,)


@dataclass(frozen=True)
class Deinterleave(Rule):
    """RoPE rows: theirs turn adjacent pairs, ours turn halves.

    Rows come in heads of ``head_width``; the last ``rope_width`` rows of each are reordered, even
    ones first. Scores do not change, for queries and keys are reordered alike.
    """

    ours: str
    name: str
    head_width: int
    rope_width: int

    @property
    def theirs(self) -> Sequence[str]:
        return (self.name,)

    def _order(self, rows: int) -> Tensor:
        pairs = torch.arange(self.rope_width).view(-1, 2).T.flatten()
        kept = torch.arange(self.head_width - self.rope_width)
        head = torch.cat([kept, pairs + len(kept)])
        starts = torch.arange(0, rows, self.head_width)
        return (starts[:, None] + head).flatten()

    def load(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0][self._order(len(tensors[0]))]

    def save(self, tensor: Tensor) -> Sequence[Tensor]:
        return (tensor[self._order(len(tensor)).argsort()],)


@dataclass(frozen=True)
class StackExperts(Rule):
    """One tensor ``[E, ...]`` from each expert's own; several parts are joined along the rows.

    ``parts`` holds, for each expert, the names of its parts (``gate_proj``, ``up_proj``), which
    have equally many rows.
    """

    ours: str
    parts: tuple[tuple[str, ...], ...]

    @property
    def theirs(self) -> Sequence[str]:
        return tuple(name for expert in self.parts for name in expert)

    def load(self, tensors: Sequence[Tensor]) -> Tensor:
        count = len(self.parts[0])
        experts = [tensors[i : i + count] for i in range(0, len(tensors), count)]
        return torch.stack([torch.cat(list(expert)) for expert in experts])

    def save(self, tensor: Tensor) -> Sequence[Tensor]:
        count = len(self.parts[0])
        return tuple(part for expert in tensor for part in expert.chunk(count))


def load_tensors(rules: Sequence[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from theirs, every key accounted for.

    Raises:
        ValueError: a tensor is missing, or one is left over.
    """
    names = [name for rule in rules for name in rule.theirs]
    missing = [name for name in names if name not in theirs]
    if missing:
        raise ValueError(_sentence("lacks", missing, "the config asks for it"))
    surplus = sorted(set(theirs) - set(names))
    if surplus:
        raise ValueError(_sentence("holds", surplus, "no rule reads it"))
    return {rule.ours: rule.load([theirs[name] for name in rule.theirs]) for rule in rules}


def save_tensors(rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours: the inverse of :func:`load_tensors`."""
    saved: dict[str, Tensor] = {}
    for rule in rules:
        saved.update(zip(rule.theirs, rule.save(ours[rule.ours]), strict=True))
    return saved


def _sentence(verb: str, names: Sequence[str], why: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the checkpoint {verb} the tensor {names[0]}{more}, and {why}"
