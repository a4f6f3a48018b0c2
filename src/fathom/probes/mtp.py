"""What multi-token prediction gives at inference: drafts the model itself agrees with.

*On text*: the share of held-out places where the first MTP module's likeliest token is the model's
own one step later. *Decoding*: greedy text with drafts (``generate.speculative``), the same tokens
as without: drafts accepted, tokens a forward, and the time of both on this device.
"""

import time

import torch

from fathom.data.dataset import Dataset
from fathom.generate.speculative import check, speculate
from fathom.model import Decoder
from fathom.probes.base import Context, Record, longest_passage

PROMPT, NEW_TOKENS, TEXTS = 24, 64, 8


@torch.inference_mode()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    try:
        check(model)
    except ValueError:
        return {}
    new = min(NEW_TOKENS, model.cfg.max_seq_len - PROMPT)
    length = min(context.seq_len, model.cfg.max_seq_len)
    rows = longest_passage(model, dataset, TEXTS * length, context.seed).view(TEXTS, length)
    prompts = [row[:PROMPT].tolist() for row in rows]
    speculate(model, prompts[0], 2)  # what is loaded once
    begun = time.perf_counter()
    found = [speculate(model, prompt, new) for prompt in prompts]
    with_drafts = time.perf_counter() - begun
    begun = time.perf_counter()
    plain = [greedy(model, prompt, new) for prompt in prompts]
    without = time.perf_counter() - begun
    forwards = sum(text.forwards for text in found)
    return {
        "accepted_on_text": agreement(model, rows),
        "accepted": sum(text.accepted for text in found) / sum(text.drafts for text in found),
        "tokens_per_forward": sum(len(text.tokens) - 1 for text in found) / forwards,
        "speedup": without / with_drafts,
        "same_tokens": float(all(a.tokens == b for a, b in zip(found, plain, strict=True))),
    }


def agreement(model: Decoder, rows_BT: torch.Tensor) -> float:
    """Share of places where the draft made at i is the model's own choice at i + 1."""
    own_BT = model(rows_BT).argmax(-1)
    drafts_BT = model.mtp_logits(rows_BT)[0].argmax(-1)
    return float((own_BT[:, 1:] == drafts_BT).double().mean())


def greedy(model: Decoder, prompt: list[int], new: int) -> list[int]:
    """The same text, a token a forward."""
    cache = model.new_cache(1, len(prompt) + new)
    tokens = torch.tensor([prompt], device=model.embed.weight.device)
    written: list[int] = []
    for _ in range(new):
        tokens = model(tokens, cache=cache)[:, -1:].argmax(-1)
        written.append(int(tokens))
    return written
