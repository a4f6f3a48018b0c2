"""A study: which arms are compared, what is held equal between them, and how rates are chosen.

A study is a TOML file. Its keys:

- ``name``, ``title``, ``question``: what is asked, for the report.
- ``[model]``, ``[data]``, ``[train]``: the first arm's run config, the keys of ``fathom train``
  (``train.steps`` and ``train.seed`` excepted: the budget and the seeds give them). No step is
  skipped as a spike unless ``train.spike_sigmas`` says so: arms would see unequal text.
- ``seeds``: every arm is trained once with each; three or more for a verdict.
- ``margin``: two arms whose interval lies within this many bits per byte are the ``same``.
- ``probes``: names of ``fathom.probes`` applied to each trained arm (its first seed).
- ``[budget]``: ``hold`` names what is equal (see ``HELD``), ``value`` how much of it there is,
  ``tolerance`` how far an arm may be off where it cannot be met exactly.
- ``[lr]``: ``sweep`` (five or more rates tried on every arm before, each for ``sweep_share`` of a
  run's steps) or ``rates`` (arm to rate, from an earlier sweep that ``source`` names); neither:
  ``train.lr`` for all, and the report says that no arm was tuned.
- ``[[arms]]``: ``name``; ``parent`` (an earlier arm; the first arm has none); ``claim``, a question
  that the pair answers; ``change``, overrides on the parent's config; ``fit = "params"`` widens or
  narrows the dense FFNs until the arm has its parent's number of parameters.

Overrides on the command line change the study as they change a run config: ``budget.value=2e5``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from fathom.layers.base import Config, require
from fathom.settings import ConfigError, Data, override, parse, read_toml

Hold = Literal["tokens", "active_flops", "params", "wall_time", "cache_bytes"]

HELD: dict[Hold, str] = {
    "tokens": "Every arm is trained on the same {value:,.0f} tokens.",
    "active_flops": "Every arm gets {value:.3g} training FLOPs, counted as three times the forward "
    "pass over its active parameters; a cheaper arm sees more tokens.",
    "params": "Every arm has as many parameters as the first (within {tolerance:.1%}) and is "
    "trained on the same {value:,.0f} tokens.",
    "wall_time": "Every arm is trained for {value:,.0f} seconds, as its step was measured before "
    "training; a faster arm sees more tokens.",
    "cache_bytes": "Every arm caches as many bytes per token as the first (within {tolerance:.1%}) "
    "and is trained on the same {value:,.0f} tokens.",
}


@dataclass(frozen=True, kw_only=True)
class Budget(Config):
    """What is held equal, and its value: tokens, FLOPs (``active_flops``) or seconds."""

    hold: Hold = "tokens"
    value: float
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        require(self.value > 0, f"value must be above 0, got {self.value}")
        require(0 < self.tolerance < 1, f"tolerance is a share of 1, got {self.tolerance}")

    @property
    def sentence(self) -> str:
        """What is equal between the arms, for a reader of the report."""
        return HELD[self.hold].format(value=self.value, tolerance=self.tolerance)


@dataclass(frozen=True, kw_only=True)
class LearningRates(Config):
    """How each arm's ``train.lr`` is chosen: swept here, recorded from a sweep, or one for all."""

    sweep: tuple[float, ...] = ()
    sweep_share: float = 1.0
    rates: dict[str, float] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        require(not (self.sweep and self.rates), "lr takes sweep or rates, not both")
        n = len(set(self.sweep))
        require(
            not self.sweep or n >= 5,
            f"sweep must hold at least 5 different rates for a parabola, got {n}",
        )
        share = self.sweep_share
        require(0 < share <= 1, f"sweep_share is a share of a run's steps, got {share}")
        low = min((*self.sweep, *self.rates.values()), default=1.0)
        require(low > 0, f"a learning rate must be above 0, got {low}")
        require(
            not self.rates or self.source != "",
            "rates need a source: say in lr.source which sweep they come from",
        )


@dataclass(frozen=True, kw_only=True)
class Arm(Config):
    """One model of the study: its parent's config with one named change."""

    name: str
    parent: str | None = None
    claim: str = ""
    change: tuple[str, ...] = ()
    fit: Literal["params"] | None = None

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name) is not None,
            f"name must be lower-case letters, digits, '-', '_' and '.', got {self.name!r}: "
            "it becomes a folder",
        )
        if self.parent is None:
            return
        require("?" in self.claim, f"claim of {self.name} must be a question, got {self.claim!r}")
        require(bool(self.change), f"change of {self.name} is empty: what differs from its parent?")


@dataclass(frozen=True, kw_only=True)
class Study(Config):
    """The whole file; the module's docstring says what each key means."""

    name: str
    title: str = ""
    question: str = ""
    model: Data
    data: Data = field(default_factory=dict)
    train: Data = field(default_factory=dict)
    budget: Budget
    seeds: tuple[int, ...] = (1, 2, 3)
    margin: float = 0.01
    probes: tuple[str, ...] = ()
    lr: LearningRates = field(default_factory=LearningRates)
    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        require(len(self.arms) >= 1, "arms must hold at least one arm, got none")
        require(self.margin > 0, f"margin must be above 0 bits per byte, got {self.margin}")
        unique = len(set(self.seeds)) == len(self.seeds) >= 1 and min(self.seeds) >= 0
        require(unique, f"seeds must be different numbers from 0 on, got {list(self.seeds)}")
        for key in ("steps", "seed"):
            require(
                key not in self.train,
                f"train.{key} cannot be set in a study: "
                + ("budget.value gives it" if key == "steps" else "seeds gives it"),
            )
        self._check_parents()
        self._check_rates()

    def _check_parents(self) -> None:
        seen: list[str] = []
        for arm in self.arms:
            require(arm.name not in seen, f"arms: two arms are called {arm.name}")
            if arm.parent is None:
                require(not seen, f"arm {arm.name} needs a parent: only the first arm has none")
            else:
                known = f"one of {', '.join(seen)}" if seen else "nothing: the first arm has none"
                require(
                    arm.parent in seen,
                    f"arm {arm.name}: parent must be an earlier arm ({known}), got {arm.parent!r}",
                )
            seen.append(arm.name)

    def _check_rates(self) -> None:
        names = [arm.name for arm in self.arms]
        wrong = sorted(set(self.lr.rates) ^ set(names)) if self.lr.rates else []
        require(
            not wrong,
            f"lr.rates must give every arm a rate and nothing else: see {', '.join(wrong)}",
        )


def list_studies() -> list[tuple[str, str]]:
    """The studies that come with Fathom: ``(name, title)``."""
    return [(path.stem, parse(Study, read_toml(path)).title) for path in _built_in()]


def load_study(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """A built-in study by its name, or any by its path, with ``key=value`` changes on top.

    Raises:
        ConfigError: no such study, or one that cannot be.
    """
    known = {path.stem: path for path in _built_in()}
    path = known.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise ConfigError(
            f"no study {str(name_or_path)!r}: give the path of a study's TOML file, or one of "
            f"{', '.join(known)}"
        )
    return parse(Study, override(read_toml(path), overrides))


def _built_in() -> list[Path]:
    folder = Path(str(resources.files("fathom.ladder") / "studies"))
    return sorted(folder.glob("*.toml"))
