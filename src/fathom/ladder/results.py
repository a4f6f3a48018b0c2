"""``results.json``: everything the report draws and scripts read, put together from finished tasks.

A pure function of what the runs left behind, so its figures depend neither on the order in which
they finished nor on how often the ladder was stopped in between.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev

from fathom.ladder.differences import Difference
from fathom.ladder.plan import PlannedArm
from fathom.ladder.study import Study
from fathom.ladder.verdict import (
    DocumentLosses,
    bootstrap_interval,
    detectable_delta,
    judge,
    typical_spread,
)
from fathom.settings import Data, to_data

Pair = tuple[list[Data], list[Data]]  # finished runs of an arm and of its parent, seed by seed


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """What is known of one arm.

    Args:
        lr: what it was trained with.
        runs: each finished seed's ``result.json``.
        failures: each other seed's reason, "not trained yet" among them.
        speed: of its training step, measured alone; None if that failed.
        probes: each probe's answer.
    """

    lr: float | None
    runs: dict[int, Data] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    speed: Data | None = None
    probes: dict[str, Data] = field(default_factory=dict)

    @property
    def failed(self) -> str | None:
        """Why the arm has no result. One failed seed is enough: survivors alone would flatter."""
        if not self.failures:
            return None
        by_reason: dict[str, list[int]] = {}
        for seed, reason in sorted(self.failures.items()):
            by_reason.setdefault(reason, []).append(seed)
        parts = [f"seed {', '.join(map(str, seeds))}: {why}" for why, seeds in by_reason.items()]
        return "; ".join(parts)


def assemble(
    study: Study,
    planned: Sequence[PlannedArm],
    outcomes: Mapping[str, ArmOutcome],
    differing: Mapping[str, list[Difference]],
    *,
    about: Data,
) -> Data:
    """The whole of ``results.json``.

    Args:
        differing: each arm's differences from its parent.
        about: what does not come from the arms: ``data``, ``env``, ``lr``, ``lr_note``,
            ``anchors``, ``commands``.
    """
    pairs = comparable(study, outcomes)
    verdicts = _verdicts(study, outcomes, pairs)
    arms = [
        _arm(p, outcomes[p.arm.name], differing[p.arm.name], verdicts.get(p.arm.name))
        for p in planned
    ]
    return {
        "study": study.name,
        "title": study.title,
        "question": study.question,
        "budget": {**to_data(study.budget), "sentence": study.budget.sentence},
        "margin": study.margin,
        "seeds": list(study.seeds),
        **about,
        "learned": learned(arms, about["anchors"]),
        "detectable": detectable(pairs, len(study.seeds)),
        "arms": arms,
    }


def _arm(
    planned: PlannedArm, outcome: ArmOutcome, differing: list[Difference], verdict: Data | None
) -> Data:
    arm, speed = planned.arm, outcome.speed or {}
    runs = [outcome.runs[seed] for seed in sorted(outcome.runs)]
    scored = runs if outcome.failed is None else []
    return {
        "name": arm.name,
        "parent": arm.parent,
        "claim": arm.claim,
        "change": list(arm.change),
        "differs": [difference.key for difference in differing],
        "differences": [asdict(difference) for difference in differing],
        "seeds": [_seed(run) for run in runs],
        "val_bpb": scores(scored),
        "symbols": _means([run["symbols"] for run in scored]),
        "evaluation_interval": evaluation_interval(scored),
        "params": planned.params,
        "active_params": planned.active_params,
        "flops_per_token": planned.flops_per_token,
        "cache_bytes_per_token": planned.cache_bytes_per_token,
        "tokens": planned.tokens,
        "train_flops": planned.train_flops,
        "lr": outcome.lr,
        "train_tokens_per_second": speed.get("tokens_per_second"),
        "threads": speed.get("threads"),
        "peak_memory_bytes": speed.get("peak_memory_bytes"),
        "probes": _balance(scored) | outcome.probes,
        "verdict": verdict,
        "curves": [{"seed": run["seed"], **run["curve"]} for run in runs],
        "failed": outcome.failed,
    }


def _balance(runs: Sequence[Data]) -> Data:
    """The first run's evenness over its training, as if a probe had measured it."""
    found = runs[0].get("balance") if runs else None
    return {"balance": found} if found else {}


def _seed(run: Data) -> Data:
    keys = ("seed", "lr", "val_bpb", "by_domain", "symbols", "tokens", "train_seconds")
    return {key: run[key] for key in keys}


def scores(runs: Sequence[Data]) -> Data:
    """``val_bpb``: over seeds, the mean and the standard deviation of one run."""
    losses = [run["val_bpb"] for run in runs]
    return {
        "mean": fmean(losses) if losses else None,
        "std": stdev(losses) if len(losses) > 1 else None,
        "n": len(losses),
        "by_domain": _means([run["by_domain"] for run in runs]),
    }


def evaluation_interval(
    runs: Sequence[Data], parents: Sequence[Data] = ()
) -> tuple[float, float] | None:
    """How far other held-out documents could have moved an arm's loss, its seeds taken together.

    With ``parents``, the runs of equal seeds: how far they could have moved arm - parent.
    """
    if not runs:
        return None
    documents = {}
    for domain in runs[0]["by_domain"]:
        arm = _bits(runs, domain)
        parent = _bits(parents, domain) if parents else [0.0] * len(arm)
        units = runs[0]["documents"][domain]["units"]
        documents[domain] = DocumentLosses(arm, parent, units)
    return bootstrap_interval(documents)


def _bits(runs: Sequence[Data], domain: str) -> list[float]:
    """Bits of each document, mean over runs."""
    columns = zip(*(run["documents"][domain]["nats"] for run in runs), strict=True)
    return [fmean(column) / math.log(2) for column in columns]


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Key by key, the mean of tables with equal keys; None without any."""
    return {key: fmean(table[key] for table in tables) for key in tables[0]} if tables else None


def comparable(study: Study, outcomes: Mapping[str, ArmOutcome]) -> dict[str, Pair]:
    """The runs of every arm that has a result, and its parent one too."""
    return {
        arm.name: paired(outcomes[arm.name].runs, outcomes[arm.parent].runs)
        for arm in study.arms
        if arm.parent is not None
        and outcomes[arm.name].failed is None
        and outcomes[arm.parent].failed is None
    }


def _verdicts(
    study: Study, outcomes: Mapping[str, ArmOutcome], pairs: Mapping[str, Pair]
) -> dict[str, Data]:
    """The verdict of every arm but the root; an arm that failed has none."""
    found = {
        arm.name: _no_verdict(f"{arm.parent}, its parent, has no result to compare with")
        for arm in study.arms
        if arm.parent is not None and outcomes[arm.name].failed is None and arm.name not in pairs
    }
    parents = {arm.name: arm.parent for arm in study.arms if arm.parent is not None}
    return found | judge_pairs(pairs, parents, margin=study.margin)


def paired(arm: Mapping[int, Data], parent: Mapping[int, Data]) -> Pair:
    """The runs of the seeds that both have, in the same order."""
    both = sorted(arm.keys() & parent.keys())
    return [arm[seed] for seed in both], [parent[seed] for seed in both]


def judge_pairs(
    pairs: Mapping[str, Pair], parents: Mapping[str, str], *, margin: float
) -> dict[str, Data]:
    """The seeds' verdict of every pair, all at once, and beside it the evaluation's uncertainty."""
    if not pairs:
        return {}
    return {
        name: {**asdict(verdict), "evaluation_interval": evaluation_interval(*pairs[name])}
        for name, verdict in judge(_losses(pairs), margin=margin, parents=parents).items()
    }


def _losses(pairs: Mapping[str, Pair]) -> dict[str, tuple[list[float], list[float]]]:
    return {
        name: ([run["val_bpb"] for run in arm], [run["val_bpb"] for run in parent])
        for name, (arm, parent) in pairs.items()
    }


def detectable(pairs: Mapping[str, Pair], n_seeds: int) -> Data:
    """The true difference of one arm that a study with this noise finds four times in five."""
    spread = typical_spread(_losses(pairs)) if pairs else None
    delta = None
    if spread is not None:
        delta = detectable_delta(spread, n_seeds=n_seeds, n_arms=len(pairs))
    if delta is None:
        return {"delta_bpb": None, "sentence": ""}
    sentence = (
        f"With this noise, {n_seeds} seeds and {len(pairs)} comparisons, a true difference of "
        f"{delta:.3f} bits per byte is found four times in five; smaller ones are mostly unsure."
    )
    return {"delta_bpb": delta, "sentence": sentence}


def _no_verdict(sentence: str) -> Data:
    nothing = dict.fromkeys(("delta_bpb", "interval", "p_value", "evaluation_interval"))
    return {"verdict": "unsure", **nothing, "n": 0, "sentence": f"unsure: {sentence}"}


def learned(arms: Sequence[Data], anchors: Mapping[str, Data]) -> Data:
    """Whether the best arm knows more than byte triples: the order-2 model on the same bytes."""
    scores = {arm["name"]: arm["val_bpb"]["mean"] for arm in arms}
    known = {name: mean for name, mean in scores.items() if mean is not None}
    order2 = anchors["order2"]["mean"]
    if not known or order2 is None:
        why = "No arm finished" if not known else "The order-2 byte model was not measured"
        nothing = {"best_arm": None, "val_bpb": None, "order2": order2, "below": None}
        return {**nothing, "sentence": f"{why}, so nothing can be said about learning."}
    best = min(known, key=lambda name: known[name])
    below = known[best] < order2
    compared = (
        f"The best arm, {best}, needs {known[best]:.3f} bits per byte; a model that counts byte "
        f"triples in the training text needs {order2:.3f} on the same held-out text."
    )
    meaning = (
        "So the arms have learnt more than that."
        if below
        else "So not even the best arm has learnt as much: read the verdicts with that in mind."
    )
    return {
        "best_arm": best,
        "val_bpb": known[best],
        "order2": order2,
        "below": below,
        "sentence": f"{compared} {meaning}",
    }
