"""Facts that a model has stored, in bits, where they can be counted: invented people.

A value drawn from n equally likely ones holds ``log2 n`` bits. A model that gives it ``b`` bits of
loss where it stands in its person's document has stored ``log2 n - b`` of them (Allen-Zhu & Li,
arXiv:2404.05405; their bits of names are left out, so ours are fewer). Of people never trained on
nobody can know anything: their figure is the control, about zero or below.

Then one part of the model is taken away, an expert or a share of a dense layer's hidden units, each
in turn: which of the known facts are lost? A fact is known if every token of its value is the
likeliest one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fathom.data.dataset import Dataset
from fathom.data.facts import DOMAIN, values_in
from fathom.data.shards import Split
from fathom.ffn.moe import MoE
from fathom.model import Decoder
from fathom.probes import modalities
from fathom.probes.base import Context, Record
from fathom.sizing.count import num_active_params, num_params

PEOPLE = 1024  # looked at, of each split
WITHOUT = 256  # looked at for each part taken away
PARTS = 8  # taken away in each layer, at most; a dense layer is cut into so many


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    """Bits per fact and in all, for training and held-out people; what removing a part costs."""
    choices = dataset.statistics.get("facts")
    if choices is None:
        return {}
    bits, known = stored(model, dataset, "train", choices, context)
    unseen, _ = stored(model, dataset, "heldout", choices, context)
    people = dataset.documents("train", DOMAIN)
    in_all = max(sum(bits.values()), 0.0) * people
    return {
        "bits_in_data": sum(map(math.log2, choices.values())) * people,
        "bits_stored": in_all,
        "bits_per_parameter": in_all / num_params(model.cfg),
        "bits_per_active_parameter": in_all / num_active_params(model.cfg),
        "bits_per_person_unseen": sum(unseen.values()),
        "facts_known": float(known.double().mean()),
        "bits_per_fact": bits,
        **removal(model, dataset, choices, context, known),
    }


def stored(
    model: Decoder,
    dataset: Dataset,
    split: Split,
    choices: dict[str, int],
    context: Context,
    most: int = PEOPLE,
) -> tuple[dict[str, float], Tensor]:
    """Mean bits stored of each fact, and which facts are known (bool, in the order of the text).

    Of the first ``most`` people of a split.
    """
    sums = dict.fromkeys(choices, 0.0)
    known: list[bool] = []
    people = min(most, dataset.documents(split, DOMAIN))
    documents = [dataset.document(split, DOMAIN, i).astype("int64").tolist() for i in range(people)]
    for start in range(0, people, context.batch_size):
        group = documents[start : start + context.batch_size]
        for ids, nats, right in zip(group, *losses(model, group), strict=True):
            for fact, begin, end in value_tokens(dataset, ids):
                value = slice(begin - 1, end - 1)  # a token's loss stands at the one before it
                sums[fact] += math.log2(choices[fact]) - float(nats[value].sum()) / math.log(2)
                known.append(bool(right[value].all()))
    return {fact: total / people for fact, total in sums.items()}, torch.tensor(known)


def losses(model: Decoder, group: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Of padded documents: nats of each next token ``[B, T]``, and whether it is the likeliest."""
    longest = max(map(len, group))
    rows = torch.tensor([ids + [0] * (longest - len(ids)) for ids in group])
    logits = model(rows[:, :-1].to(model.embed.weight.device)).float().cpu()
    targets = rows[:, 1:]
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return nats, logits.argmax(-1) == targets


def value_tokens(dataset: Dataset, ids: list[int]) -> Iterator[tuple[str, int, int]]:
    """Each fact and the range of ids that hold its value."""
    sizes = dataset.tokenizer.token_bytes[ids]
    ends = sizes.cumsum() - dataset.tokenizer.extra_bytes  # BOS and EOS stand for no bytes
    for fact, begin, end in values_in(dataset.tokenizer.decode(ids[1:-1])):
        inside = ((ends > begin) & (ends - sizes < end) & (sizes > 0)).nonzero()[0]
        yield fact, int(inside[0]), int(inside[-1]) + 1


def removal(
    model: Decoder, dataset: Dataset, choices: dict[str, int], context: Context, known: Tensor
) -> Record:
    """The share of the known facts that is lost when one part goes, by layer: mean over parts."""
    known = known[: WITHOUT * len(choices)]
    if not known.any():
        return {}
    lost, shares = [], []
    for block in model.blocks:
        weights = parts(block.get_submodule("ffn"))
        shares.append(1 / len(weights))
        missing = []
        for weight in weights[:: -(-len(weights) // PARTS)]:
            with zeroed(weight):
                _, left = stored(model, dataset, "train", choices, context, WITHOUT)
            missing.append(float((known & ~left).sum() / known.sum()))
        lost.append(sum(missing) / len(missing))
    return {"layer": list(range(len(lost))), "part_of_layer": shares, "lost_without_it": lost}


def parts(ffn: nn.Module) -> list[Tensor]:
    """Views of the weights that let each part of a layer speak: routed experts, or hidden units."""
    weights = modalities.parts(ffn)
    return list(weights) if isinstance(ffn, MoE) else list(weights.tensor_split(PARTS))


@contextmanager
def zeroed(weight: Tensor) -> Iterator[None]:
    """Within it, a weight is zero."""
    before = weight.clone()
    weight.zero_()
    try:
        yield
    finally:
        weight.copy_(before)
