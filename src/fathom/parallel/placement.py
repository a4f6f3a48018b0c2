"""Which rank holds which experts, from recorded loads: EPLB (github.com/deepseek-ai/EPLB).

Busy experts get replicas, which share their tokens, and replicas are packed so that every GPU has
about as much to do. With groups of experts (group-limited routing) and nodes that divide them, a
group stays within a node: tokens then reach few nodes. Plain numbers, one layer at a time.
"""

from collections.abc import Sequence

from fathom.layers.base import require


def place(
    load: Sequence[float], *, n_slots: int, n_gpus: int, n_nodes: int = 1, n_groups: int = 1
) -> list[int]:
    """The expert in each slot; GPU g has slots ``g * n_slots / n_gpus`` on.

    Args:
        load: tokens of each expert.
        n_slots: experts and replicas in all.
        n_gpus: over which slots are spread equally.
        n_nodes: over which GPUs are spread equally.
        n_groups: groups of neighbouring experts; kept together where nodes divide them.

    Raises:
        ValueError: sizes that do not divide each other.
    """
    check(len(load), n_slots=n_slots, n_gpus=n_gpus, n_nodes=n_nodes, n_groups=n_groups)
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    size = len(load) // n_groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(n_groups)]
    by_node = pack([sum(load[e] for e in group) for group in members], n_nodes)
    slots: list[int] = []
    for groups in by_node:
        experts = [expert for group in groups for expert in members[group]]
        chosen, shares = replicate([load[e] for e in experts], n_slots // n_nodes)
        for gpu in pack(shares, n_gpus // n_nodes):
            slots += [experts[chosen[slot]] for slot in gpu]
    return slots


def pack(weights: Sequence[float], n_packs: int) -> list[list[int]]:
    """Items into packs of equal number: the heaviest first, each into the lightest with room."""
    room = len(weights) // n_packs
    if room == 1:
        return [[item] for item in range(n_packs)]
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    sums = [0.0] * n_packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        lightest = min((p for p in range(n_packs) if len(packs[p]) < room), key=sums.__getitem__)
        packs[lightest].append(item)
        sums[lightest] += weights[item]
    return packs


def replicate(weights: Sequence[float], n_slots: int) -> tuple[list[int], list[float]]:
    """The item of each slot, and each slot's share of its weight.

    Each slot beyond the first of every item goes to the one with the most weight per replica.
    """
    slots, copies = list(range(len(weights))), [1] * len(weights)
    while len(slots) < n_slots:
        busiest = max(range(len(weights)), key=lambda item: weights[item] / copies[item])
        slots.append(busiest)
        copies[busiest] += 1
    return slots, [weights[item] / copies[item] for item in slots]


def gpu_loads(load: Sequence[float], slots: Sequence[int], n_gpus: int) -> list[float]:
    """What each GPU has to do, replicas sharing their expert's tokens equally."""
    share = [load[expert] / slots.count(expert) for expert in slots]
    room = len(slots) // n_gpus
    return [sum(share[gpu * room : (gpu + 1) * room]) for gpu in range(n_gpus)]


def imbalance(loads: Sequence[float]) -> float:
    """The largest load over the mean: 1 is even."""
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


def check(n_experts: int, *, n_slots: int, n_gpus: int, n_nodes: int, n_groups: int) -> None:
    """Refuse sizes that do not divide each other."""
    require(n_slots >= n_experts, f"n_slots must be at least the {n_experts} experts: {n_slots}")
    for what, whole, parts in (
        ("n_gpus must divide n_slots", n_slots, n_gpus),
        ("n_nodes must divide n_gpus", n_gpus, n_nodes),
        ("n_groups must divide the experts", n_experts, n_groups),
    ):
        require(parts >= 1 and whole % parts == 0, f"{what} ({whole}), got {parts}")
