"""Every config key in which an arm differs from its parent: one change per step, or it is flagged.

Layers are compared one by one, so two models whose groups are cut differently still show exactly
what differs; equal differences of neighbouring layers are then told once, and so is their number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from fathom.settings import Data

Mark = Literal["named", "fit", "tuned", "extra"]
GROUPS = "model.groups"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key and its two values; None: the key is not there (or is none).

    ``mark`` says why they differ: ``named`` in the arm's change, ``fit`` to hold the budget,
    ``tuned`` (the learning rate, chosen for each arm alike), or ``extra``: nothing accounts for it.
    """

    key: str
    parent: Any
    arm: Any
    mark: Mark


def differences(
    parent: Data,
    arm: Data,
    *,
    change: Sequence[str] = (),
    fitted: Sequence[str] = (),
    tuned: Sequence[str] = (),
) -> list[Difference]:
    """Compare two resolved run configs (``fathom.settings.to_data``).

    Args:
        change: the arm's overrides, ``key=value``.
        fitted: keys that were set to hold the budget.
        tuned: keys that were chosen for each arm by the same procedure.
    """
    marks: list[tuple[Mark, Sequence[str]]] = [
        ("named", [text.partition("=")[0].strip() for text in change]),
        ("fit", fitted),
        ("tuned", tuned),
    ]
    plain = _compare(_flat(_without_groups(parent)), _flat(_without_groups(arm)))
    found = [Difference(key=k, parent=a, arm=b, mark=_mark([k], marks)) for k, a, b in plain]
    return found + _layer_differences(_groups(parent), _groups(arm), marks)


def _layer_differences(
    parent: Sequence[Data], arm: Sequence[Data], marks: list[tuple[Mark, Sequence[str]]]
) -> list[Difference]:
    rows = []  # (key within the layer, value, value, mark) -> the layers that show it
    pairs = list(zip(_layers(parent), _layers(arm), strict=False))  # what is above has no other
    for layer, ((old_group, old), (new_group, new)) in enumerate(pairs):
        for key, a, b in _compare(_flat(old), _flat(new)):
            names = [f"{GROUPS}.{group}.{key}" for group in (new_group, old_group)]
            rows.append((key, a, b, _mark(names, marks), layer))
    rows.sort(key=lambda row: (row[0], repr(row[1:4]), row[4]))
    found = []
    for (key, a, b, mark), same in groupby(rows, key=lambda row: row[:4]):
        where = _where([row[4] for row in same], len(pairs))
        found.append(Difference(key=f"{where}.{key}", parent=a, arm=b, mark=mark))
    return found + _depth_difference(parent, arm, marks)


def _depth_difference(
    parent: Sequence[Data], arm: Sequence[Data], marks: list[tuple[Mark, Sequence[str]]]
) -> list[Difference]:
    old, new = len(_layers(parent)), len(_layers(arm))
    if old == new:
        return []
    names = [f"{GROUPS}.{group}.count" for group in range(max(len(parent), len(arm)))]
    return [Difference(key=f"{GROUPS}.*.count", parent=old, arm=new, mark=_mark(names, marks))]


def _where(layers: Sequence[int], n_layers: int) -> str:
    """``model.groups.*`` for all layers, as an override names them; else ``model.layers.0-2,5``."""
    if len(layers) == n_layers:
        return f"{GROUPS}.*"
    runs = groupby(enumerate(layers), key=lambda item: item[1] - item[0])
    ends = [[layer for _, layer in run] for _, run in runs]
    return "model.layers." + ",".join(
        str(end[0]) if len(end) == 1 else f"{end[0]}-{end[-1]}" for end in ends
    )


def _groups(config: Data) -> list[Data]:
    return config.get("model", {}).get("groups", [])


def _layers(groups: Sequence[Data]) -> list[tuple[int, Data]]:
    """Each layer's group index and its config, bottom to top."""
    return [
        (index, {key: value for key, value in group.items() if key != "count"})
        for index, group in enumerate(groups)
        for _ in range(group["count"])
    ]


def _without_groups(config: Data) -> Data:
    model = {key: value for key, value in config.get("model", {}).items() if key != "groups"}
    return {**config, "model": model}


def _flat(value: Any, prefix: str = "") -> Data:
    """Dotted keys to plain values. A list of tables is numbered; a list of plain values is one."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: Data = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _compare(parent: Data, arm: Data) -> list[tuple[str, Any, Any]]:
    rows = [(key, parent.get(key), arm.get(key)) for key in sorted(parent.keys() | arm.keys())]
    return [(key, a, b) for key, a, b in rows if a != b or type(a) is not type(b)]


def _mark(keys: Sequence[str], marks: list[tuple[Mark, Sequence[str]]]) -> Mark:
    """The first reason that covers one of a difference's names."""
    for mark, patterns in marks:
        if any(_covers(pattern, key) for pattern in patterns for key in keys):
            return mark
    return "extra"


def _covers(pattern: str, key: str) -> bool:
    """Whether an override's key is the key itself or a table above it; ``*`` is any list item."""
    regex = re.escape(pattern.removeprefix("--")).replace(r"\*", r"\d+")
    return re.fullmatch(rf"{regex}(\..+)?", key) is not None
