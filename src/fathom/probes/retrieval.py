"""Looking things up in the context: key-value recall, and a passage that is repeated.

*Recall*: ``n`` pairs of random text tokens, key then value, each key once; then one of the keys. It
is found if, of the values shown, the right one is the likeliest next token: chance is 1/n.
*Repeat*: a held-out passage stands in the context twice; its bits per token, each time.
"""

import math

import torch
from torch import Tensor

from fathom.data.dataset import Dataset
from fathom.model import Decoder
from fathom.probes.base import Context, Record, longest_passage

PAIRS = (2, 4, 8, 16, 32, 64)
TRIALS = 128


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    pairs = [n for n in PAIRS if 2 * n + 1 <= context.seq_len]
    generator = torch.Generator().manual_seed(context.seed)
    vocabulary = text_ids(dataset)
    accuracy = [recall(model, n, vocabulary, generator, context.batch_size) for n in pairs]
    first, second = repeat_bits(model, dataset, context)
    return {
        "pairs": pairs,
        "accuracy": accuracy,
        "chance": [1 / n for n in pairs],
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
    device = model.embed.weight.device
    ids = torch.stack(
        [vocabulary[torch.randperm(len(vocabulary), generator=generator)[: 2 * n]]
         for _ in range(TRIALS)]
    )  # fmt: skip
    asked = torch.randint(n, (TRIALS,), generator=generator)
    keys, values = ids[:, ::2], ids[:, 1::2]
    prompt = torch.cat([ids, keys.gather(1, asked[:, None])], dim=1)
    found = []
    for rows, shown in zip(prompt.split(batch_size), values.split(batch_size), strict=True):
        logits = model(rows.to(device))[:, -1].cpu()
        found.append(logits.gather(1, shown).argmax(1))
    return float((torch.cat(found) == asked).double().mean())


def repeat_bits(model: Decoder, dataset: Dataset, context: Context) -> tuple[float, float]:
    """Bits per token of held-out passages at their first and their second time in the context."""
    half = context.seq_len // 2
    text = longest_passage(model, dataset, context.batch_size * half, context.seed)
    once = text.view(context.batch_size, half)
    twice = torch.cat([once, once], dim=1)
    losses = model.token_losses(twice[:, :-1], twice[:, 1:])
    first, second = losses[:, : half - 1], losses[:, half:]
    return float(first.mean()) / math.log(2), float(second.mean()) / math.log(2)
