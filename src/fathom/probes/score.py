"""How much of an attention score comes from position: the share of its variance.

A query's scores over its keys, less their mean (the softmax does not see it), are split by the law
of total variance: what the distance alone predicts, and the rest, which is content. The control
repeats it with each query's scores in random order, and shows what chance would give.
"""

import torch
from torch import Tensor

from fathom.data.dataset import Dataset
from fathom.model import Decoder
from fathom.probes.base import Context, Record, attention_inputs, attentions, heldout, text_domains


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    batch = next(heldout(model, dataset, text_domains(dataset)[0], context))
    tokens = batch.tokens[:4]
    with attention_inputs(model) as inputs:
        model(tokens)
    generator = torch.Generator().manual_seed(context.seed)
    shares, controls = [], []
    for part, (x_BTD, step) in zip(attentions(model), inputs, strict=True):
        scores = part.scores(x_BTD, step)
        if scores is None:
            return {}
        shares.append(position_share(scores.float()))
        controls.append(position_share(shuffled(scores.float(), generator)))
    return {
        "layer": list(range(len(shares))),
        "position_share": shares,
        "position_share_shuffled": controls,
        "mean": sum(shares) / len(shares),
    }


def position_share(scores_BHTS: Tensor) -> float:
    """Mean over heads of Var(E[score | distance]) / Var(score), scores centred per query.

    Queries of the second half alone, so that every distance up to T/2 is seen by all of them.
    """
    length = scores_BHTS.shape[-1]
    places = torch.arange(length, device=scores_BHTS.device)
    distance_TS = places[:, None] - places
    use_TS = (distance_TS >= 0) & (distance_TS < length // 2) & (places[:, None] >= length // 2)
    seen = torch.isfinite(scores_BHTS).all(0).all(0) & use_TS
    if not seen.any():
        return 0.0
    centred = torch.where(seen, scores_BHTS, 0).double()
    per_query = seen.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(seen, centred - centred.sum(-1, keepdim=True) / per_query, 0)
    flat_FN = centred[..., seen].transpose(0, 1).flatten(2).transpose(1, 2).flatten(1)
    distance_N = distance_TS[seen].repeat_interleave(scores_BHTS.shape[0])
    return _between(flat_FN, distance_N, length)


def _between(values_HN: Tensor, group_N: Tensor, groups: int) -> float:
    count = torch.bincount(group_N, minlength=groups).double()
    sums = values_HN.new_zeros(len(values_HN), groups)
    sums.index_add_(1, group_N, values_HN)
    means = sums / count.clamp(min=1)
    between = (count * means.square()).sum(-1) / count.sum()
    total = values_HN.square().mean(-1)
    return float((between / total.clamp(min=1e-30)).mean())


def shuffled(scores_BHTS: Tensor, generator: torch.Generator) -> Tensor:
    """Each query's visible scores in random order; what is hidden stays hidden."""
    hidden = ~torch.isfinite(scores_BHTS)
    keys = torch.rand(scores_BHTS.shape, generator=generator).to(hidden.device)
    keys = keys.masked_fill(hidden, 2.0)
    order = keys.argsort(dim=-1)  # the visible ones first, in random order
    places = hidden.long().argsort(dim=-1, stable=True)  # the visible places, in order
    mixed = scores_BHTS.gather(-1, order)
    return torch.full_like(scores_BHTS, float("-inf")).scatter(-1, places, mixed)
