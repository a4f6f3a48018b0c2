"""What ``results.json`` says besides the arms: data, anchors, machine, rates, how to repeat it."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from fathom.data import anchors as measured
from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset
from fathom.ladder.pool import available_cores
from fathom.ladder.rates import Swept
from fathom.ladder.study import Study, load_study
from fathom.ladder.task import read_object, write_json
from fathom.settings import ConfigError, Data

XZ_TRAINING_BYTES = 16 * 2**20  # compressing more training text than this takes minutes


def data_facts(cfg: DataConfig, dataset: Dataset) -> Data:
    """What the arms were trained and measured on."""
    weights = dataset.weights(cfg)
    return {
        "source": cfg.source if cfg.source == "bundled" else Path(cfg.source).name,
        "fingerprint": dataset.fingerprint,
        "vocab_size": dataset.vocab_size,
        "seq_len": cfg.seq_len,
        "domains": {
            domain: {
                "kind": dataset.kind(domain),
                "weight": weights[domain],
                "train_documents": dataset.documents("train", domain),
                "train_tokens": dataset.tokens("train", domain),
                "heldout_documents": dataset.documents("heldout", domain),
                "heldout_bytes": int(dataset.document_bytes("heldout", domain).sum()),
            }
            for domain in dataset.domains
        },
    }


def anchors(dataset: Dataset, file: Path) -> Data:
    """Bits per byte of what needs no training, on the same held-out bytes; kept in ``file``.

    ``xz`` compresses the held-out text alone, ``xz_after_training`` what it adds to the training
    text (left out where that is large), ``order2`` counts byte triples of the training text.
    """
    known = read_object(file)
    if known is not None and known.get("key") == dataset.fingerprint:
        return known["anchors"]
    text = measured.text_domains(dataset)
    size = sum(int(dataset.document_bytes("train", domain).sum()) for domain in text)
    found = {"xz": measured.xz_bits_per_byte(dataset, with_training=False)}
    if size <= XZ_TRAINING_BYTES:
        found["xz_after_training"] = measured.xz_bits_per_byte(dataset, with_training=True)
    found["order2"] = measured.order2_bits_per_byte(dataset)
    rows = {
        name: {"mean": measured.mean_over_domains(bits), "by_domain": bits}
        for name, bits in found.items()
    }
    write_json(file, {"key": dataset.fingerprint, "anchors": rows})
    return rows


def environment_facts(runs: Iterable[Path], *, jobs: int) -> Data:
    """The ``env.json`` of the run folders; where they differ, a value lists all there were."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for key, value in (read_object(run / "env.json") or {}).items():
            values = found.setdefault(key, [])
            if value is not None and str(value) not in values:
                values.append(str(value))
    joined = {key: ", ".join(values) for key, values in found.items()}
    return {**joined, "cores": available_cores(), "jobs": jobs}


def rate_note(study: Study, swept: Mapping[str, Swept], seed: int) -> str:
    """How the learning rates were chosen, for the report."""
    if study.lr.rates:
        return f"Each arm's learning rate is its own, from {study.lr.source}."
    if not study.lr.sweep:
        return (
            "Learning rates were not tuned: every arm was trained with its config's train.lr, "
            "and an arm may do better at a rate of its own."
        )
    edges = [
        f"{arm}: {found.note}" for arm, found in swept.items() if "parabola in" not in found.note
    ]
    unclear = f" Not so for {'; '.join(edges)}." if edges else ""
    share = study.lr.sweep_share
    shorter = f", {share:.0%} of the steps each," if share < 1 else ""
    return (
        f"Each arm's learning rate is the minimum of a parabola in log lr through a sweep of "
        f"{len(study.lr.sweep)} rates{shorter} with seed {seed}, which no verdict uses.{unclear}"
    )


def rate_facts(study: Study, swept: Mapping[str, Swept], rates: Mapping[str, float]) -> Data:
    """The rates, and what a sweep here measured."""
    chosen = "recorded" if study.lr.rates else "swept" if study.lr.sweep else "one for all"
    return {
        "chosen": chosen,
        "source": study.lr.source,
        "rates": dict(rates),
        "sweep": {
            arm: {"points": [list(point) for point in found.points], "note": found.note}
            for arm, found in swept.items()
        },
    }


def repeat_command(study: Study, out: Path) -> str:
    """What runs the same study again, or goes on with it."""
    name, *settings = _study_arguments(study, out)
    return shlex.join(["fathom", "ladder", name, "--out", str(out), *settings])


def _study_arguments(study: Study, out: Path) -> list[str]:
    """The built-in study's name if this is it, on other data perhaps; else the folder's file."""
    source = study.data.get("source")
    try:
        built_in = load_study(study.name)
    except ConfigError:
        return [str(out / "study.toml")]
    if built_in == study:
        return [study.name]
    if replace(built_in, data={**built_in.data, "source": source}) == study:
        return [study.name, f"data.source={source}"]
    return [str(out / "study.toml")]
