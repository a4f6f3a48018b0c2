"""How evenly ranks would be used, by a run's recorded loads: as experts lie, placed by EPLB.

A run with ``train.log_load=true`` writes down how many tokens each expert got, step by step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fathom.layers.base import require
from fathom.parallel.placement import gpu_loads, imbalance, place
from fathom.train.metrics import read_lines

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class RankLoads:
    """One MoE layer.

    Args:
        layer: which MoE layer, from 0, those of MTP last.
        before: each rank's load over the mean with neighbouring experts on one rank.
        after: the same with replicas and experts where ``place`` puts them.
        slots: the expert in each slot of that placement.
    """

    layer: int
    before: list[float]
    after: list[float]
    slots: list[int]


def rank_loads(
    run: Path, ranks: int, *, replicas: int = 0, nodes: int = 1, groups: int = 1, last: int = 100
) -> list[RankLoads]:
    """The loads of ``ranks`` in every MoE layer, by the mean of the last recorded steps.

    Args:
        run: a run folder.
        ranks: over which the experts are spread.
        replicas: slots beyond one per expert.
        nodes: on which the ranks lie, equally many on each.
        groups: groups of neighbouring experts, kept on a node if ``nodes`` divides them.
        last: how many steps count.

    Raises:
        ValueError: the run recorded no loads, or sizes do not divide each other.
    """
    lines = [line for line in read_lines(run / "metrics.jsonl") if "layers" in line][-last:]
    steps = [line["layers"] for line in lines if all("load" in each for each in line["layers"])]
    require(
        bool(steps),
        f"{run} has no loads of experts in its metrics.jsonl: train it with train.log_load=true",
    )
    found = []
    for layer, of_layer in enumerate(zip(*steps, strict=True)):
        load = [mean(loads) for loads in zip(*(each["load"] for each in of_layer), strict=True)]
        n_slots = len(load) + replicas
        slots = place(load, n_slots=n_slots, n_gpus=ranks, n_nodes=nodes, n_groups=groups)
        before = over_mean(gpu_loads(load, range(len(load)), ranks))
        after = over_mean(gpu_loads(load, slots, ranks))
        found.append(RankLoads(layer=layer, before=before, after=after, slots=slots))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def over_mean(loads: Sequence[float]) -> list[float]:
    """Each load over the mean of all; 1 where nothing was done."""
    middle = mean(loads)
    return [load / middle if middle else 1.0 for load in loads]


def drawn(loads: Sequence[float]) -> str:
    """A bar for each rank, from nothing to twice the mean and more, and the busiest in figures."""
    bars = "".join(BARS[min(int(load / 2 * len(BARS)), len(BARS) - 1)] for load in loads)
    return f"{bars}  {imbalance(loads):.2f}"
