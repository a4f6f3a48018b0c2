"""Does a sparse attention select what full attention would weigh: its blocks against the true mass.

The true attention of a layer is the softmax of its own scores over every token that a query may
see. *Selected* is the share of that mass in the blocks that were read; *best* what as many blocks
could hold at most; *chance* what the current block and others drawn at random would hold. *Recall*
is how many of those best blocks were read. Queries that may read every block are left out.

Shapes: B batch, T tokens, H heads, I selection heads, N selected blocks, J blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fathom.attention.base import Selection
from fathom.data.dataset import Dataset
from fathom.model import Decoder
from fathom.probes.base import Context, Record, attention_inputs, attentions, heldout, text_domains


class Queries(NamedTuple):
    """Of each query, ``[B, T, I]``: shares from 0 to 1, and whether it had a choice."""

    selected_BTI: Tensor
    best_BTI: Tensor
    chance_BTI: Tensor
    recall_BTI: Tensor
    choice_BTI: Tensor


class Shares(NamedTuple):
    """Means over the queries of one layer that had a choice."""

    selected: float
    best: float
    chance: float
    recall: float


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    batch = next(heldout(model, dataset, text_domains(dataset)[0], context))
    tokens = batch.tokens[:4]
    with attention_inputs(model) as inputs:
        model(tokens)
    layers, found = [], []
    for layer, (part, (x_BTD, step)) in enumerate(zip(attentions(model), inputs, strict=True)):
        selection, scores_BHTS = part.selection(x_BTD, step), part.scores(x_BTD, step)
        if selection is None or scores_BHTS is None:
            continue
        got = shares(scores_BHTS, selection)
        if got is not None:
            layers.append(layer)
            found.append(got)
    if not found:
        return {}
    columns = {name: [getattr(each, name) for each in found] for name in Shares._fields}
    means = {f"mean_{name}": sum(column) / len(column) for name, column in columns.items()}
    return {"layer": layers, **columns, **means}


def shares(scores_BHTS: Tensor, selection: Selection) -> Shares | None:
    """Of one layer whose rows are one document each; None if every query reads every block."""
    found = queries_shares(scores_BHTS, selection)
    if not found.choice_BTI.any():
        return None
    return Shares(*(float(each[found.choice_BTI].double().mean()) for each in found[:4]))


def queries_shares(scores_BHTS: Tensor, selection: Selection) -> Queries:
    """The same query by query."""
    mass_BTIJ, read_BTIJ = block_mass(scores_BHTS, selection), blocks_read(scores_BHTS, selection)
    blocks_J = torch.arange(mass_BTIJ.shape[-1], device=mass_BTIJ.device)
    current_T = torch.arange(mass_BTIJ.shape[1], device=mass_BTIJ.device) // selection.block_size
    count_BTI = read_BTIJ.sum(-1)
    ranked = mass_BTIJ.masked_fill(blocks_J > current_T[:, None, None], -1.0)
    rank_BTIJ = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    best_BTIJ = rank_BTIJ < count_BTI[..., None]
    own_BTI = (mass_BTIJ * (blocks_J == current_T[:, None, None])).sum(-1)
    drawn_BTI = (count_BTI - 1) / current_T[:, None].clamp(min=1)
    return Queries(
        selected_BTI=(mass_BTIJ * read_BTIJ).sum(-1),
        best_BTI=(mass_BTIJ * best_BTIJ).sum(-1),
        chance_BTI=own_BTI + drawn_BTI * (1 - own_BTI),
        recall_BTI=(best_BTIJ & read_BTIJ).sum(-1) / count_BTI.clamp(min=1),
        choice_BTI=count_BTI < current_T[:, None] + 1,
    )


def block_mass(scores_BHTS: Tensor, selection: Selection) -> Tensor:
    """Share of the true attention in each block, ``[B, T, I, J]``: the mean of I's heads."""
    size, keys = selection.block_size, scores_BHTS.shape[-1]
    weights_BTHS = scores_BHTS.float().softmax(-1).transpose(1, 2)
    weights_BTIS = weights_BTHS.unflatten(2, (selection.starts_BTIN.shape[2], -1)).mean(3)
    return pad(weights_BTIS, (0, -keys % size)).unflatten(-1, (-1, size)).sum(-1)


def blocks_read(scores_BHTS: Tensor, selection: Selection) -> Tensor:
    """Which blocks each selection head reads, bool ``[B, T, I, J]``."""
    size, starts_BTIN = selection.block_size, selection.starts_BTIN
    blocks = -(-scores_BHTS.shape[-1] // size)
    numbers = torch.where(starts_BTIN < 0, blocks, starts_BTIN // size).to(torch.int64)
    read = torch.zeros(*numbers.shape[:3], blocks + 1, dtype=torch.bool, device=numbers.device)
    return read.scatter(-1, numbers, True)[..., :blocks]
