"""Which experts fire on what: load, evenness, and how far domains use different experts.

*Divergence* is the Jensen-Shannon divergence in bits between the domains' shares of the experts,
each domain counted alike, mean over MoE layers: 0 if all domains use the experts alike, at most
log2(domains). Finite samples differ by chance, so the same figure stands beside it with the rows'
domain labels shuffled: only what exceeds that control is separation.

Shapes: N rows of text, L MoE layers, E experts.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from fathom.data.dataset import Dataset
from fathom.ffn.balance import dead_experts, max_violation
from fathom.ffn.router import Choice
from fathom.model import Decoder
from fathom.probes.base import Context, Record, heldout

SHUFFLES = 20


def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    main = [moe for name, moe in model.moe_layers() if name.startswith("blocks.")]
    if not main or len({moe.cfg.n_routed_experts for moe in main}) > 1:
        return {}
    counts, labels = [], []
    for index, domain in enumerate(dataset.domains):
        found = row_counts(model, dataset, domain, context)
        counts.append(found)
        labels += [index] * len(found)
    counts_NLE, label_N = np.concatenate(counts), np.array(labels)
    rng = np.random.default_rng(context.seed)
    shuffled = [divergence(counts_NLE, rng.permutation(label_N)) for _ in range(SHUFFLES)]
    load_LE = counts_NLE.sum(0)
    layers = [torch.from_numpy(load) for load in load_LE]
    return {
        "load": (load_LE / load_LE.sum(-1, keepdims=True)).tolist(),
        "max_violation": float(np.mean([float(max_violation(load)) for load in layers])),
        "dead_experts": int(sum(int(dead_experts(load)) for load in layers)),
        "entropy": float(np.mean([_entropy(load) for load in load_LE])),
        "divergence": divergence(counts_NLE, label_N),
        "divergence_shuffled": float(np.mean(shuffled)),
        "by_domain": {
            domain: _shares(counts_NLE[label_N == i].sum(0)).tolist()
            for i, domain in enumerate(dataset.domains)
        },
    }


@torch.no_grad()
def row_counts(
    model: Decoder, dataset: Dataset, domain: str, context: Context
) -> NDArray[np.int64]:
    """How often each row of held-out text chose each expert, ``[N, L, E]``; padding left out."""
    layers = [moe for name, moe in model.moe_layers() if name.startswith("blocks.")]
    experts = layers[0].cfg.n_routed_experts
    chosen: list[torch.Tensor] = []
    hooks = [
        moe.router.register_forward_hook(lambda *call: chosen.append(_ids(call[2])))
        for moe in layers
    ]
    rows = []
    try:
        for batch in heldout(model, dataset, domain, context):
            chosen.clear()
            model(batch.tokens, cu_seqlens=batch.cu_seqlens)
            real_BT = (batch.documents >= 0).cpu()
            rows.append(np.stack([_count(ids.cpu(), real_BT, experts) for ids in chosen], axis=1))
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(rows)


def _ids(choice: Choice) -> torch.Tensor:
    return choice.expert_ids_NK


def _count(ids_NK: torch.Tensor, real_BT: torch.Tensor, experts: int) -> NDArray[np.int64]:
    """Choices per row of the batch and expert, of tokens that are not padding."""
    batch, length = real_BT.shape
    row_N1 = torch.arange(batch).repeat_interleave(length)[:, None]
    flat = (row_N1 * experts + ids_NK)[real_BT.flatten()].flatten()
    return torch.bincount(flat, minlength=batch * experts).view(batch, experts).numpy()


def divergence(counts_NLE: NDArray[np.int64], label_N: NDArray[np.int64]) -> float:
    """Jensen-Shannon divergence in bits between labels' expert shares, mean over layers."""
    present = np.unique(label_N)
    shares_KLE = np.stack([_shares(counts_NLE[label_N == k].sum(0)) for k in present])
    mixed = _entropy_bits(shares_KLE.mean(0))
    return float((mixed - _entropy_bits(shares_KLE).mean(0)).mean())


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _entropy_bits(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    safe = np.where(shares > 0, shares, 1.0)
    return -(shares * np.log2(safe)).sum(-1)


def _entropy(load: NDArray[np.int64]) -> float:
    """Of a layer's load, as a share of the even load's (1: perfectly even)."""
    if len(load) == 1:
        return 1.0
    return float(_entropy_bits(_shares(load)) / np.log2(len(load)))
