"""Looking things up in the context: key-value recall, a needle in a text, a repeated passage.

*Recall*: ``n`` pairs of random text tokens, key then value, each key once; then one of the keys. It
is found if, of the values shown, the right one is the likeliest next token: chance is 1/n.
*Needle*: one such pair within held-out text, by the text's length and how deep the pair lies in it;
the text ends with the key, and the right value must beat 15 random ones.
*Repeat*: a held-out passage stands in the context twice; its bits per token, each time.
"""

import math
from statistics import fmean

import torch
from torch import Tensor

from fathom.data.dataset import Dataset
from fathom.model import Decoder
from fathom.probes.base import Context, Record, longest_passage

PAIRS = (2, 4, 8, 16, 32, 64)
TRIALS = 128
DEPTHS = (0, 25, 50, 75, 100)  # per cent of the text that stands before the needle
NEEDLES, CHOICES = 32, 16


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    pairs = [n for n in PAIRS if 2 * n + 1 <= context.seq_len]
    generator = torch.Generator().manual_seed(context.seed)
    vocabulary = text_ids(dataset)
    accuracy = [recall(model, n, vocabulary, generator, context.batch_size) for n in pairs]
    lengths = [context.seq_len // part for part in (4, 2, 1) if context.seq_len >= 4 * part]
    needles = [needle(model, dataset, length, generator, context) for length in lengths]
    first, second = repeat_bits(model, dataset, context)
    return {
        "pairs": pairs,
        "accuracy": accuracy,
        "chance": [1 / n for n in pairs],
        "needle": {
            "by_length": {"tokens": lengths, "accuracy": [fmean(found) for found in needles]},
            "by_depth": {
                "per_cent": list(DEPTHS),
                "accuracy": [fmean(found) for found in zip(*needles, strict=True)],
            },
            "chance": 1 / CHOICES,
        },
        "repeat_bits_first": first,
        "repeat_bits_second": second,
    }


def text_ids(dataset: Dataset) -> Tensor:
    """Ids that stand for text."""
    return torch.from_numpy(dataset.tokenizer.token_bytes > 0).nonzero().flatten()


def recall(
    model: Decoder, n: int, vocabulary: Tensor, generator: torch.Generator, batch_size: int
) -> float:
    """Share of ``TRIALS`` in which the value of the asked key is the likeliest of those shown."""
    ids = draw(vocabulary, TRIALS, 2 * n, generator)
    asked = torch.randint(n, (TRIALS,), generator=generator)
    keys, values = ids[:, ::2], ids[:, 1::2]
    prompt = torch.cat([ids, keys.gather(1, asked[:, None])], dim=1)
    return float((likeliest(model, prompt, values, batch_size) == asked).double().mean())


def needle(
    model: Decoder, dataset: Dataset, length: int, generator: torch.Generator, context: Context
) -> list[float]:
    """Share of ``NEEDLES`` texts of a length in which the pair is found, for each of ``DEPTHS``."""
    text = longest_passage(model, dataset, NEEDLES * length, context.seed).cpu()
    drawn = draw(text_ids(dataset), NEEDLES, CHOICES + 1, generator)
    keys, values = drawn[:, 0], drawn[:, 1:]
    accuracy = []
    for depth in DEPTHS:
        prompt, place = text.view(NEEDLES, length).clone(), depth * (length - 3) // 100
        prompt[:, place], prompt[:, place + 1], prompt[:, -1] = keys, values[:, 0], keys
        found = likeliest(model, prompt, values, context.batch_size)
        accuracy.append(float((found == 0).double().mean()))
    return accuracy


def draw(vocabulary: Tensor, rows: int, n: int, generator: torch.Generator) -> Tensor:
    """``[rows, n]`` ids of text, different ones in a row."""
    orders = [torch.randperm(len(vocabulary), generator=generator)[:n] for _ in range(rows)]
    return vocabulary[torch.stack(orders)]


def likeliest(model: Decoder, prompt_BT: Tensor, choices_BC: Tensor, batch_size: int) -> Tensor:
    """Which of its choices each prompt most likely goes on with, ``[B]``."""
    device = model.embed.weight.device
    found = []
    for rows, choices in zip(
        prompt_BT.split(batch_size), choices_BC.split(batch_size), strict=True
    ):
        logits = model(rows.to(device))[:, -1].cpu()
        found.append(logits.gather(1, choices).argmax(1))
    return torch.cat(found)


def repeat_bits(model: Decoder, dataset: Dataset, context: Context) -> tuple[float, float]:
    """Bits per token of held-out passages at their first and their second time in the context."""
    half = context.seq_len // 2
    text = longest_passage(model, dataset, context.batch_size * half, context.seed)
    once = text.view(context.batch_size, half)
    twice = torch.cat([once, once], dim=1)
    losses = model.token_losses(twice[:, :-1], twice[:, 1:])
    first, second = losses[:, : half - 1], losses[:, half:]
    return float(first.mean()) / math.log(2), float(second.mean()) / math.log(2)
