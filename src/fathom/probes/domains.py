"""Held-out loss by domain: bits per byte of text, bits per symbol of anything else."""

from fathom.data.dataset import Dataset
from fathom.model import Decoder
from fathom.probes.base import Context, Record
from fathom.train.evaluate import evaluate


def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    found = evaluate(
        model,
        dataset,
        seq_len=context.seq_len,
        batch_size=context.batch_size,
        max_bytes=context.max_bytes,
    )
    return {"mean": found.mean, "by_domain": found.by_domain, "symbols": found.symbols}
