"""What a run records: a JSON line per step, read from the device a step late so nothing waits."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fathom.ffn import Routing
from fathom.ffn.balance import dead_experts, load_entropy, max_violation
from fathom.model import Losses
from fathom.parallel import Layout

Record = dict[str, Any]


class Sums:
    """Losses and routing of one step's micro-batches, whose losses add up to the step's mean.

    Attributes:
        losses: by name, each a scalar.
        counts: tokens per expert of each MoE layer over the whole step, int64 ``[E]``.
        means: of each MoE layer, summed over the micro-batches: the entropy of its router in nats;
            where experts lie on several ranks, then on how many ranks and nodes a token has some.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.counts: list[Tensor] = []
        self.means: list[Tensor] = []
        self.micro_batches = 0

    def add(self, losses: Losses) -> None:
        """Take in a micro-batch: its values, not its graph."""
        self.micro_batches += 1
        values = {"total_loss": losses.total, "loss": losses.main}
        values |= {"mtp_loss": losses.mtp, "balance_loss": losses.balance}
        values |= {"index_loss": losses.index}
        counts = [routing.tokens_per_expert for routing in losses.routing]
        means = [_means(routing) for routing in losses.routing]
        if self.micro_batches == 1:
            self.losses = {name: value.detach() for name, value in values.items()}
            self.counts, self.means = counts, means
            return
        self.losses = {name: self.losses[name] + value.detach() for name, value in values.items()}
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.means = [a + b for a, b in zip(self.means, means, strict=True)]

    def over_ranks(self, layout: Layout) -> None:
        """Make these figures of one rank those of all: sums, and means of means."""
        if layout.world == 1:
            return
        values = [*self.losses.values()]
        parts = [torch.stack(values).double(), *self.counts]
        parts += [mean / layout.world for mean in self.means]
        total = layout.sum(torch.cat([part.double() for part in parts]))
        losses, *rest = total.split([len(part) for part in parts])
        self.losses = dict(zip(self.losses, losses.to(values[0].dtype), strict=True))
        layers = len(self.counts)
        self.counts = [count.long() for count in rest[:layers]]
        self.means = [mean.to(self.means[0].dtype) for mean in rest[layers:]]

    def vectors(self) -> list[Tensor]:
        """The counts of each layer, then the means of each; empty without MoE layers."""
        return [*self.counts, *(mean / self.micro_batches for mean in self.means)]


def _means(routing: Routing) -> Tensor:
    entropy = routing.entropy.detach()[None]
    return entropy if routing.reach is None else torch.cat([entropy, routing.reach])


class Figures:
    """Numbers of one step on their way from the device to the host.

    Args:
        scalars: by name.
        vectors: any number of 1-D tensors.
    """

    def __init__(self, scalars: Mapping[str, Tensor], vectors: Sequence[Tensor]) -> None:
        self._names = list(scalars)
        values = torch.stack([value.float() for value in scalars.values()])
        self._sizes = [len(values), *map(len, vectors)]
        flat = torch.cat([values, *(vector.float() for vector in vectors)])
        self._host = flat.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if flat.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[dict[str, float], list[Tensor]]:
        """The scalars and the vectors; waits if they are not there yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values, *vectors = self._host.split(self._sizes)
        return dict(zip(self._names, values.tolist(), strict=True)), vectors


def routing_figures(
    counts: Sequence[Tensor],
    means: Sequence[Sequence[float]],
    *,
    log_load: bool,
    ranks: int = 1,
) -> Record:
    """How evenly the experts were used in one step; empty without MoE layers.

    ``max_violation`` and ``load_entropy`` (nats) are means over layers, ``dead_experts`` the sum;
    ``layers`` has each layer's own, the entropy of its router's scores, and with ``log_load`` its
    load: each expert's tokens over the mean. Where ``ranks`` share the experts, neighbours on one,
    ``rank_max_violation`` is that of the ranks' sums, and ``ranks_per_token`` and
    ``nodes_per_token`` say on how many a token has experts. ``means`` are those of :class:`Sums`.
    """
    if not counts:
        return {}
    columns: dict[str, list[Any]] = {
        "max_violation": _by_layer(max_violation, counts),
        "dead_experts": _by_layer(dead_experts, counts),
        "load_entropy": _by_layer(load_entropy, counts),
        "router_entropy": [mean[0] for mean in means],
    }
    if ranks > 1:
        columns["ranks_per_token"] = [mean[1] for mean in means]
        columns["nodes_per_token"] = [mean[2] for mean in means]
        loads = [count.unflatten(0, (ranks, -1)).sum(-1) for count in counts]
        columns["rank_max_violation"] = _by_layer(max_violation, loads)
    if log_load:
        columns["load"] = [(c / c.mean().clamp(min=1e-9)).tolist() for c in counts]
    layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    of_ranks = ("rank_max_violation", "ranks_per_token", "nodes_per_token") if ranks > 1 else ()
    averaged = ("max_violation", "load_entropy", *of_ranks)
    return {
        **{name: sum(layer[name] for layer in layers) / len(layers) for name in averaged},
        "dead_experts": sum(layer["dead_experts"] for layer in layers),
        "layers": layers,
    }


def _by_layer(figure: Callable[[Tensor], Tensor], counts: Sequence[Tensor]) -> list[float]:
    """A figure of each layer, in one go where all have as many experts."""
    if len({len(count) for count in counts}) == 1:
        return figure(torch.stack(list(counts))).tolist()
    return [figure(count).item() for count in counts]


class NoLines:
    """The records of a rank that writes none."""

    def write(self, record: Record) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def rewind(self, upto: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class JsonLines:
    """A file of one JSON object per line, in which no step stands twice.

    Args:
        path: made if it is not there; lines after step ``upto``, and a torn last line, are removed.
    """

    def __init__(self, path: Path, *, upto: int) -> None:
        self._path = path
        self._file = self._open(upto)

    def _open(self, upto: int) -> TextIO:
        kept = [json.dumps(record) for record in read_lines(self._path) if record["step"] <= upto]
        replace_text(self._path, "".join(f"{line}\n" for line in kept))
        return self._path.open("a", encoding="utf-8")

    def rewind(self, upto: int) -> None:
        """Remove the lines after step ``upto``."""
        self._file.close()
        self._file = self._open(upto)

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON lacks (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[Record]:
    """The records of a JSON-lines file, up to any torn line that an interrupted write left."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a stop leaves the old content or the new, never half of it."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
