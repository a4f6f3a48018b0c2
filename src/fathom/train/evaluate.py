"""Held-out losses by domain: bits per byte of text, bits per symbol of anything else.

Bits per byte do not depend on the tokenizer, so models with other vocabularies compare:
``sum of -ln p / (ln 2 * bytes of the predicted tokens)``. Sums are kept per document, for those who
want to know how sure a difference is (a bootstrap over documents).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fathom.data.dataset import Dataset
from fathom.data.loader import IGNORE, EvalBatch, heldout_batches
from fathom.model import Decoder
from fathom.parallel import ALONE, Layout
from fathom.train.metrics import Record, read_lines


@dataclass(frozen=True)
class DocumentSums:
    """Sums per document that was read of one domain, in the fixed order of the held-out list.

    Args:
        nats: float64 ``[documents]``, sum of ``-ln p`` over the predicted tokens.
        units: int64 ``[documents]``, bytes of those tokens (text) or how many are symbols.
    """

    nats: NDArray[np.float64]
    units: NDArray[np.int64]

    @property
    def bits(self) -> float:
        """Bits per unit over all documents."""
        return float(self.nats.sum() / (math.log(2) * self.units.sum()))


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses.

    Args:
        mean: unweighted mean of ``by_domain``; None if no domain is text.
        by_domain: bits per byte of each text domain.
        symbols: bits per symbol of each other domain, which the mean leaves out.
        documents: what these were summed from; empty when read back from ``eval.jsonl``.
    """

    mean: float | None
    by_domain: dict[str, float]
    symbols: dict[str, float]
    documents: dict[str, DocumentSums] = field(repr=False)

    def record(self) -> Record:
        """Its part of a line of ``eval.jsonl``."""
        return {"val_bpb": self.mean, "by_domain": self.by_domain, "symbols": self.symbols}


def evaluate(
    model: Decoder,
    dataset: Dataset,
    *,
    seq_len: int,
    batch_size: int = 16,
    max_bytes: int | None = None,
    domains: Sequence[str] | None = None,
    precision: AbstractContextManager[object] | None = None,
    layout: Layout = ALONE,
) -> Evaluation:
    """Measure a model on the held-out documents.

    Args:
        seq_len: context in tokens; a document is cut every ``seq_len`` tokens.
        batch_size: rows per forward; the result does not depend on it, rounding apart.
        max_bytes: read so many bytes of each domain; None: all.
        domains: those to measure; None: all of the dataset.
        precision: an autocast context; None: as the weights are.
        layout: of the ranks that share the work; all get the whole result.
    """
    sums: dict[str, DocumentSums] = {}
    was_training = model.training
    model.eval()
    try:
        with precision or nullcontext(), torch.no_grad():
            for domain in dataset.domains if domains is None else domains:
                batches = heldout_batches(
                    dataset,
                    domain,
                    seq_len=seq_len,
                    batch_size=batch_size,
                    max_bytes=max_bytes,
                    rank=layout.rank,
                    world=layout.world,
                )
                sums[domain] = _domain(model, dataset, domain, batches, layout)
    finally:
        model.train(was_training)
    bits = {domain: found.bits for domain, found in sums.items()}
    text = {domain: value for domain, value in bits.items() if dataset.kind(domain) == "text"}
    symbols = {domain: value for domain, value in bits.items() if domain not in text}
    mean = sum(text.values()) / len(text) if text else None
    return Evaluation(mean, text, symbols, sums)


def last_evaluation(file: Path) -> Evaluation | None:
    """The newest line of an ``eval.jsonl``."""
    lines = read_lines(file)
    if not lines:
        return None
    return Evaluation(lines[-1]["val_bpb"], lines[-1]["by_domain"], lines[-1]["symbols"], {})


def _domain(
    model: Decoder,
    dataset: Dataset,
    domain: str,
    batches: Iterator[EvalBatch],
    layout: Layout,
) -> DocumentSums:
    tokenizer = dataset.tokenizer
    text = dataset.kind(domain) == "text"
    sums = nats, units, tokens = np.zeros((3, dataset.documents("heldout", domain)))
    device = model.embed.weight.device
    for batch in batches:
        losses = model.token_losses(
            batch.tokens.to(device), batch.targets.to(device), batch.cu_seqlens.to(device)
        )
        predicted = (batch.targets != IGNORE).numpy()
        owner = batch.documents.numpy()[predicted]
        inputs, targets = batch.tokens.numpy()[predicted], batch.targets.numpy()[predicted]
        unit = tokenizer.predicted_bytes(inputs, targets) if text else tokenizer.is_symbol[targets]
        nats += np.bincount(owner, losses.double().cpu().numpy()[predicted], len(nats))
        units += np.bincount(owner, unit, len(nats))
        tokens += np.bincount(owner, minlength=len(nats))
    layout.sum(torch.from_numpy(sums))  # in place
    read = tokens > 0
    return DocumentSums(nats[read], units[read].astype(np.int64))
