"""Do kinds of data live in parts of the model? Take a domain's parts away and see who suffers.

The parts of a domain are those that it uses most against the mean of the other domains, an eighth
of each layer: experts by how often they are chosen, hidden units of a dense layer by the mean of
their absolute activation. With them gone, the loss of every domain rises by some share. If domains
have parts of their own, their own loss rises and the others' does not. Two controls: a dense model
under the same knife, and as many parts chosen by chance.

Shapes: L layers, U parts of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fathom.data.dataset import Dataset
from fathom.ffn.dense import SwiGLU
from fathom.ffn.moe import MoE
from fathom.ffn.router import Choice
from fathom.model import Decoder
from fathom.probes.base import Context, Record, heldout
from fathom.train.evaluate import evaluate

SHARE = 1 / 8  # of each layer's parts, at least one
CHANCES = 3  # draws of the control


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    if len(dataset.domains) < 2:
        return {}
    used = {domain: usage(model, dataset, domain, context) for domain in dataset.domains}
    whole = losses(model, dataset, context)
    rise: dict[str, dict[str, float]] = {}
    for domain in dataset.domains:
        with without(model, own_parts(used, domain)):
            rise[domain] = rises(whole, losses(model, dataset, context))
    own = [rise[domain][domain] for domain in whole]
    others = [rise[a][b] for a in whole for b in whole if a != b]
    return {
        "own_loss_rise": sum(own) / len(own),
        "other_loss_rise": sum(others) / len(others),
        "chance_loss_rise": chance(model, dataset, context, whole, used),
        "part_of_layer": SHARE,
        "loss_rise": rise,
    }


def usage(model: Decoder, dataset: Dataset, domain: str, context: Context) -> list[Tensor]:
    """How much a domain uses each part of each layer: ``[U]``, adding up to 1."""
    seen: list[Tensor] = []
    layers = [block.get_submodule("ffn") for block in model.blocks]
    sums = [torch.zeros(len(parts(ffn)), dtype=torch.float64) for ffn in layers]
    with listening(layers, seen):
        for batch in heldout(model, dataset, domain, context):
            seen.clear()
            model(batch.tokens, cu_seqlens=batch.cu_seqlens)
            real_N = (batch.documents >= 0).flatten()
            for total, found_NU in zip(sums, seen, strict=True):
                total += found_NU[real_N].double().sum(0).cpu()
    return [total / total.sum() for total in sums]


@contextmanager
def listening(layers: Sequence[nn.Module], seen: list[Tensor]) -> Iterator[None]:
    """Collects of every layer and forward how much each token used each part, ``[N, U]``."""

    def chosen(module: nn.Module, inputs: tuple[Tensor, ...], choice: Choice) -> None:
        experts = choice.scores_NE.shape[1]
        seen.append(nn.functional.one_hot(choice.expert_ids_NK, experts).sum(1))

    def active(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2).abs())

    hooks = [
        ffn.router.register_forward_hook(chosen)
        if isinstance(ffn, MoE)
        else ffn.get_submodule("w_down").register_forward_pre_hook(active)
        for ffn in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts(ffn: nn.Module) -> Tensor:
    """A view ``[U, ...]`` of the weights that let each part of a layer speak."""
    if isinstance(ffn, MoE):
        return ffn.experts.w_down.data
    assert isinstance(ffn, SwiGLU)
    return ffn.w_down.weight.data.T


def own_parts(used: Mapping[str, Sequence[Tensor]], domain: str) -> list[Tensor]:
    """Of each layer the parts that a domain uses most, against the mean of the others."""
    found = []
    for layer, mine_U in enumerate(used[domain]):
        others = [usage[layer] for name, usage in used.items() if name != domain]
        ratio_U = mine_U / (torch.stack(others).mean(0) + 1e-12)
        found.append(ratio_U.topk(how_many(len(mine_U))).indices)
    return found


def how_many(n_parts: int) -> int:
    return max(round(n_parts * SHARE), 1)


@contextmanager
def without(model: Decoder, gone: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the named parts of each layer are silent."""
    with ExitStack() as stack:
        for block, which in zip(model.blocks, gone, strict=True):
            weights = parts(block.get_submodule("ffn"))
            stack.callback(weights.copy_, weights.clone())
            weights[which.to(weights.device)] = 0
        yield


def losses(model: Decoder, dataset: Dataset, context: Context) -> dict[str, float]:
    """Held-out loss of each domain."""
    found = evaluate(
        model,
        dataset,
        seq_len=context.seq_len,
        batch_size=context.batch_size,
        max_bytes=context.max_bytes,
    )
    return {**found.by_domain, **found.symbols}


def rises(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By what share each loss rose: 0.1 is a tenth."""
    return {domain: after[domain] / before[domain] - 1 for domain in before}


def chance(
    model: Decoder,
    dataset: Dataset,
    context: Context,
    whole: Mapping[str, float],
    used: Mapping[str, Sequence[Tensor]],
) -> float:
    """The mean rise when as many parts go that nobody chose."""
    generator = torch.Generator().manual_seed(context.seed)
    sizes = [len(layer) for layer in next(iter(used.values()))]
    found = []
    for _ in range(CHANCES):
        drawn = [torch.randperm(n, generator=generator)[: how_many(n)] for n in sizes]
        with without(model, drawn):
            found += rises(whole, losses(model, dataset, context)).values()
    return sum(found) / len(found)
