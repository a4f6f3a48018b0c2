"""What the probes found, read from whatever shape they left it in.

A record's numbers become columns of a table. Lists of one length beside a list of rising whole
numbers become lines over it. So a new probe appears in the report without a change here; the known
ones have a title and a sentence in ``TITLES``.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fathom.ladder.curves import CHANCE, Points
from fathom.ladder.recorded import Arm, Study, items, number, numbers, table
from fathom.ladder.tables import Table, figure_table, keys, words

TITLES = {
    "position": (
        "Loss by place in the context",
        "How much a token gains from what stands before it.",
    ),
    "speed": (
        "Decoding: speed and cache",
        "One token at a time from a cache, as when text is generated. MLA can rebuild its keys "
        "and values (expanded) or work on its latents (absorbed).",
    ),
    "length": (
        "Time against length",
        "Milliseconds of one attention layer on one sequence, its projections and what it selects "
        "by included. Where the lines of two arms cross, one begins to pay.",
    ),
    "balance": (
        "Evenness of the experts over training",
        "The busiest expert's load over the mean, less one; experts without a token in a step, all "
        "layers together; entropy of the load in nats. In training batches.",
    ),
    "retrieval": (
        "Retrieval from the context",
        "Pairs of random tokens are shown, then one key: is its value the likeliest of those? One "
        "pair within text of some length, at some depth: is its value found among sixteen? And how "
        "many bits does a passage cost when it is read for the first and the second time?",
    ),
    "facts": (
        "Facts stored",
        "Invented people have facts of a known number of bits; of those, how many the model can "
        "tell again. Then one part at a time is taken from a layer, an expert or an eighth of the "
        "hidden units: the share of the facts known that is lost, by layer.",
    ),
    "modalities": (
        "Parts of a domain's own",
        "An eighth of each layer is taken away, the experts (or hidden units) that one domain uses "
        "most against the others: by what share its own loss rises, the others' losses, and all of "
        "them when as many parts go by chance.",
    ),
    "mtp": (
        "Drafts of multi-token prediction",
        "The share of the MTP module's guesses that the model itself agrees with, on held-out text "
        "and while it writes; tokens a forward, and the speed against one token at a time.",
    ),
    "reach": (
        "Reach of position",
        "Whether the best query for it could find a token by its distance alone, among so many "
        "tokens. This is what the position code allows, not what the arm does. Mirror: are a "
        "distance and the longest wavelength less it alike (1), or not (0)?",
    ),
    "score": (
        "Position's share of the score",
        "Share of the attention scores' variance that the distance alone predicts; shuffled is "
        "what chance would give.",
    ),
    "selection": (
        "What sparse attention selects",
        "Share of the true attention's mass in the blocks that were read; best is what as many "
        "blocks could hold, chance what blocks drawn at random would. Recall: how many of the best "
        "were read.",
    ),
}
ELSEWHERE = ("routing", "domains")  # these have sections of their own


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One probe over all arms. ``lines``: figure -> (name of its axis, arm -> points)."""

    title: str
    about: str
    table: Table | None
    lines: dict[str, tuple[str, dict[str, Points]]]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One arm's use of its experts.

    Args:
        load: ``[layer][expert]``, ratio to the fair share.
        by_domain: domain to ``[expert]`` ratios, in the layer where the domains differ most.
        layer: that layer.
        figures: everything single.
    """

    arm: str
    load: list[list[float]]
    by_domain: dict[str, list[float]]
    layer: int
    divergence: float | None
    divergence_shuffled: float | None
    figures: dict[str, object]


def readings(study: Study) -> list[Reading]:
    """Every probe without a section of its own, the known ones first."""
    names = [name for name in keys(arm.probes for arm in study.finished) if name not in ELSEWHERE]
    known = [name for name in TITLES if name in names]
    found = []
    for name in known + [name for name in names if name not in TITLES]:
        title, about = TITLES.get(name, (words(name).capitalize(), ""))
        records = {arm.name: arm.probes[name] for arm in study.finished if arm.probes.get(name)}
        figures = {arm: got for arm, record in records.items() if (got := figures_in(record))}
        shown = figure_table(f"{title}: measured on the first seed of each arm", figures)
        lines = _by_figure({arm: lines_in(record) for arm, record in records.items()})
        if shown or lines:
            found.append(Reading(title=title, about=about, table=shown, lines=lines))
    return found


def routings(study: Study) -> list[Routing]:
    """What the routing probe found, for each arm that has experts."""
    records = [(arm, table(arm.probes.get("routing"))) for arm in study.finished]
    return [_routing(arm, record) for arm, record in records if record]


def _routing(arm: Arm, record: Mapping[str, object]) -> Routing:
    domains = {name: _layers(load) for name, load in table(record.get("by_domain")).items()}
    domains = {name: layers for name, layers in domains.items() if layers}
    depth = min(map(len, domains.values()), default=0)
    spread = [_spread([layers[at] for layers in domains.values()]) for at in range(depth)]
    layer = spread.index(max(spread)) if spread else 0
    return Routing(
        arm=arm.name,
        load=_layers(record.get("load")),
        by_domain={name: layers[layer] for name, layers in domains.items()},
        layer=layer,
        divergence=number(record.get("divergence")),
        divergence_shuffled=number(record.get("divergence_shuffled")),
        figures=figures_in(
            {key: v for key, v in record.items() if key not in ("load", "by_domain")}
        ),
    )


def _layers(load: object) -> list[list[float]]:
    """``[layer][expert]``, counts or shares, as ratios to the fair share; no empty layers."""
    found = [[number(value) or 0.0 for value in items(layer)] for layer in items(load)]
    return [[v * len(layer) / sum(layer) for v in layer] for layer in found if sum(layer) > 0]


def _spread(loads: Sequence[Sequence[float]]) -> float:
    """How far domains differ in one layer: over the experts, largest less smallest ratio."""
    return sum(max(expert) - min(expert) for expert in zip(*loads, strict=False))


def _by_figure(
    arms: Mapping[str, Mapping[str, tuple[str, Points]]],
) -> dict[str, tuple[str, dict[str, Points]]]:
    """Arm -> figure -> line to figure -> arm -> line; what chance gives joins the other figures."""
    found: dict[str, tuple[str, dict[str, Points]]] = {}
    for arm, lines in arms.items():
        for name, (x, points) in lines.items():
            found.setdefault(name, (x, {}))[1][arm] = points
    chance = found.pop(CHANCE, None) if len(found) > 1 else None
    if chance:
        longest = max(chance[1].values(), key=len)
        for x, by_arm in found.values():
            if x == chance[0]:
                by_arm[CHANCE] = longest
    return found


def figures_in(record: object) -> dict[str, object]:
    """The numbers and words anywhere in a record, by their path; what is a line is left out."""
    found = {}
    for path, item in _leaves(_upright(record)):
        said = _listed(item) if isinstance(item, list) else item
        if isinstance(said, bool) or not isinstance(said, int | float | str):
            said = str(said) if isinstance(said, bool) else None
        if said not in (None, ""):
            found[words(" ".join(path)) or "value"] = said
    return found


def lines_in(record: object, path: tuple[str, ...] = ()) -> dict[str, tuple[str, Points]]:
    """Every line in a record: its name to the name of its axis and its points."""
    node = table(_upright(record))
    found: dict[str, tuple[str, Points]] = {}
    x = _axis(node)
    for key, item in node.items():
        if isinstance(item, dict):
            found |= lines_in(item, (*path, key))
        elif x and key in _beside(node, x):
            pairs = zip(map(number, items(node[x])), map(number, items(item)), strict=True)
            points = [(a, b) for a, b in pairs if a is not None and b is not None]
            found[words(" ".join((*path, key)))] = (words(x), points)
    return found


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if not isinstance(value, dict):
        yield path, value
        return
    node = table(value)
    x = _axis(node)
    drawn = {x, *_beside(node, x)} if x else set()
    for key, item in node.items():
        if key not in drawn:
            yield from _leaves(_upright(item), (*path, key))


def _upright(value: object) -> object:
    """A list of records as a record of lists; numbers under whole numbers as two lists."""
    rows = [table(item) for item in items(value)]
    if rows and all(rows):
        return {key: [row.get(key) for row in rows] for key in keys(rows)}
    keyed = table(value)
    if len(keyed) >= 3 and len(numbers(value)) == len(keyed) and all(map(str.isdecimal, keyed)):
        pairs = sorted((int(key), item) for key, item in numbers(value).items())
        return {"at": [at for at, _ in pairs], "value": [item for _, item in pairs]}
    return value


def _axis(node: Mapping[str, object]) -> str | None:
    """The first key with three rising whole numbers or more, and another list of that length."""
    for key, item in node.items():
        found = [
            value for value in map(number, items(item)) if value is not None and value % 1 == 0
        ]
        rising = all(a < b for a, b in itertools.pairwise(found))
        if 3 <= len(found) == len(items(item)) and rising and _beside(node, key):
            return key
    return None


def _beside(node: Mapping[str, object], x: str) -> list[str]:
    """Keys of lists as long as the axis' that hold a number."""
    length = len(items(node[x]))
    lists = {key: items(item) for key, item in node.items() if key != x}
    return [
        key
        for key, item in lists.items()
        if len(item) == length and any(number(value) is not None for value in item)
    ]


def _listed(values: Sequence[object]) -> str:
    """A short list in full, a longer one by its ends, a list of lists not at all."""
    found = [number(value) for value in values]
    known = [value for value in found if value is not None]
    if len(known) < len(values) or not known:
        return ""
    if len(values) <= 4:
        return ", ".join(f"{value:.4g}" for value in known)
    return f"{min(known):.4g} to {max(known):.4g} ({len(values)} values)"
