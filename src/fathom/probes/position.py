"""Loss by place in the context: does the model use what stands far before a token?

Bits per byte of all held-out text tokens that stand at places ``start`` to the next start.
"""

import math

import numpy as np

from fathom.data.dataset import Dataset
from fathom.data.loader import IGNORE
from fathom.layers.step import Step
from fathom.model import Decoder
from fathom.probes.base import Context, Record, heldout, text_domains


def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    starts = [0, *(2**i for i in range(2, 30) if 2**i < context.seq_len)]
    nats, num_bytes = np.zeros(len(starts)), np.zeros(len(starts))
    for domain in text_domains(dataset):
        for batch in heldout(model, dataset, domain, context):
            losses = model.token_losses(batch.tokens, batch.targets, batch.cu_seqlens)
            places = Step.full(batch.tokens, batch.cu_seqlens).positions_BT.cpu().numpy()
            inputs, targets = batch.tokens.cpu().numpy(), batch.targets.cpu().numpy()
            valid = targets != IGNORE
            bucket = np.searchsorted(starts, places[valid], side="right") - 1
            nats += np.bincount(bucket, losses.double().cpu().numpy()[valid], len(starts))
            sizes = dataset.tokenizer.predicted_bytes(inputs[valid], targets[valid])
            num_bytes += np.bincount(bucket, sizes, len(starts))
    seen = num_bytes > 0
    bits = nats[seen] / (math.log(2) * num_bytes[seen])
    return {"place": np.array(starts)[seen].tolist(), "bits_per_byte": bits.tolist()}
