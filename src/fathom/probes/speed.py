"""Decoding one token at a time from a cache: tokens per second, and the bytes that it keeps.

MLA is measured in both of its forms. Batch 1, greedy, the prompt half the context; the median of
the decode steps, so that one hiccup of the machine does not count.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from fathom.attention.mla import MLA
from fathom.data.dataset import Dataset
from fathom.model import Decoder
from fathom.probes.base import Context, Record, longest_passage
from fathom.sizing.count import cache_bytes_per_token

NEW_TOKENS = 24


def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    record: Record = {"cache_bytes_per_token": cache_bytes_per_token(model.cfg)}
    if not any(isinstance(part, MLA) for part in model.modules()):
        return record | {"decode_tokens_per_second": decode_rate(model, dataset, context)}
    for form in ("expanded", "absorbed"):
        with mla_form(model, "always" if form == "absorbed" else "never"):
            record[f"decode_tokens_per_second_{form}"] = decode_rate(model, dataset, context)
    return record


@torch.no_grad()
def decode_rate(model: Decoder, dataset: Dataset, context: Context) -> float:
    prompt = longest_passage(model, dataset, max(context.seq_len // 2, 1), context.seed)
    cache = model.new_cache(1, prompt.shape[1] + NEW_TOKENS)
    token = model(prompt, cache=cache)[:, -1:].argmax(-1)
    seconds = []
    for _ in range(NEW_TOKENS):
        start = time.perf_counter()
        token = model(token, cache=cache)[:, -1:].argmax(-1)
        token.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[NEW_TOKENS // 4 :])


@contextmanager
def mla_form(model: Decoder, absorb: Literal["always", "never"]) -> Iterator[None]:
    """Every MLA in one form, then as it was."""
    layers = [part for part in model.modules() if isinstance(part, MLA)]
    before = [layer.cfg for layer in layers]
    try:
        for layer in layers:
            layer.cfg = dataclasses.replace(layer.cfg, absorb=absorb)
        yield
    finally:
        for layer, cfg in zip(layers, before, strict=True):
            layer.cfg = cfg
