"""What a layout costs: bytes in each rank's memory, and bytes that it sends in a step, by axis.

Memory follows the rule of ``sizing/memory.py``. Bytes are those that one rank sends:

* ``ep``: a row of D numbers for each other rank on which a token has experts, there, back, and both
  ways again in the backward; with it K gates and choices, and K gradients of gates back; before
  that two counts for each rank. Of even routing the expected number of rows;
* a copy that ``s`` ranks share: its parameters gathered before the forward and again before the
  backward, its gradients scattered, ``(s - 1) / s`` of it each time, in every micro-batch;
* ``r`` copies: their gradients added up, ``2 (r - 1) / r`` of a copy's part once a step (a ring).

What is not in a block (embedding, head, last norm) stays gathered from the forward on.
"""

import math
from typing import TypedDict

from fathom.config import ModelConfig, ParallelConfig
from fathom.ffn import MoEConfig
from fathom.layers.base import require
from fathom.sizing.count import num_mtp_params, num_params
from fathom.sizing.memory import training_memory

WIDE = 4  # bytes of a parameter and of its gradient, float32
TILE = 128  # channels per FP8 scale of a dispatched row


class RankMemory(TypedDict):
    """Bytes of one rank. ``gathered``: the largest block whole, and what is in none, if cut."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    total: int


class Wire(TypedDict):
    """Bytes that one rank sends in an optimizer step.

    ``exchange``: tokens to experts and back, over ``ep``; ``gather`` and ``scatter``: parameters
    and gradients among the ranks that share a copy; ``copies``: gradients among copies.
    """

    exchange: int
    gather: int
    scatter: int
    copies: int
    total: int


class ParallelSize(TypedDict):
    """What ``fathom size --parallel`` adds."""

    dp: int
    ep: int
    shard: int
    ranks: int
    experts_per_rank: int
    params_per_rank: int
    memory: RankMemory
    wire: Wire


def parallel_size(
    model: ModelConfig,
    layout: ParallelConfig,
    *,
    n_tokens: int,
    micro_batches: int = 1,
    itemsize: int = 2,
) -> ParallelSize:
    """Memory and bytes on the wire of one rank.

    Args:
        model: the model.
        layout: the sizes of the axes.
        n_tokens: of one rank in a micro-batch.
        micro_batches: of a step.
        itemsize: bytes of a number of an activation: 2 in bf16.

    Raises:
        ValueError: the experts cannot be spread like that, or ``n_tokens`` is below 1.
    """
    layout.check_model(model)
    require(n_tokens >= 1, f"n_tokens must be at least 1, got {n_tokens}")
    experts = expert_params(model)
    dense = num_params(model) + num_mtp_params(model) - experts
    held = math.ceil(dense / layout.shard) + math.ceil(experts / layout.ep / layout.expert_shard)
    return ParallelSize(
        dp=layout.dp,
        ep=layout.ep,
        shard=layout.shard,
        ranks=layout.world,
        experts_per_rank=max((moe.n_routed_experts for _, moe in moes(model)), default=0)
        // layout.ep,
        params_per_rank=held,
        memory=_memory(model, layout, held, n_tokens),
        wire=_wire(model, layout, dense, experts, n_tokens, micro_batches, itemsize),
    )


def moes(model: ModelConfig) -> list[tuple[int, MoEConfig]]:
    """The MoE layers as (how many, config), those of MTP included."""
    depths = 0 if model.mtp is None else model.mtp.n_mtp_modules
    layers = [*((group.count, group.ffn) for group in model.groups), (depths, model.groups[-1].ffn)]
    return [(count, ffn) for count, ffn in layers if count and isinstance(ffn, MoEConfig)]


def expert_params(model: ModelConfig) -> int:
    """Parameters of the routed experts, those of MTP modules included."""
    return sum(
        count * moe.n_routed_experts * 3 * model.dim * moe.inter_dim for count, moe in moes(model)
    )


def exchange_bytes(dim: int, top_k: int, rows: int, itemsize: int, *, fp8: bool) -> int:
    """Of ``rows`` that leave in one MoE layer: there and back, forward and backward."""
    there = dim + 4 * math.ceil(dim / TILE) if fp8 else dim * itemsize
    return rows * (there + 3 * dim * itemsize + 3 * WIDE * top_k)


def ranks_reached(moe: MoEConfig, ep: int) -> float:
    """On how many of ``ep`` ranks a token has experts, if every allowed choice is as likely.

    Neighbouring experts are on one rank and in one group; of the groups a token keeps
    ``n_limited_groups``, and chooses among their experts.
    """
    local, group = moe.n_routed_experts // ep, moe.n_routed_experts // moe.n_expert_groups
    mine, size = max(local // group, 1), min(local, group)  # groups of which a rank has a part
    others, kept = moe.n_expert_groups - mine, moe.n_limited_groups
    none = 0.0
    for here in range(min(mine, kept) + 1):
        of_groups = math.comb(mine, here) * math.comb(others, kept - here)
        elsewhere = math.comb(kept * group - here * size, moe.top_k)
        none += of_groups * elsewhere / math.comb(kept * group, moe.top_k)
    return ep * (1 - none / math.comb(moe.n_expert_groups, kept))


def _memory(model: ModelConfig, layout: ParallelConfig, held: int, n_tokens: int) -> RankMemory:
    work = training_memory(model, n_tokens)
    gathered = 0
    if layout.shard > 1:
        gathered = WIDE * (max(block_params(model, layout)) + _root_params(model))
    parts = {
        "weights": WIDE * held,
        "gradients": WIDE * held,
        "optimizer": 2 * WIDE * held,
        "gathered": gathered,
        "activations": work["activations"],
        "loss": work["loss"],
    }
    return RankMemory(**parts, total=sum(parts.values()))


def block_params(model: ModelConfig, layout: ParallelConfig) -> list[int]:
    """Parameters that a rank has of each kind of block while it computes."""
    sizes = []
    for group in model.groups:
        ffn = group.ffn.num_params(model.dim)
        if isinstance(group.ffn, MoEConfig):
            routed = group.ffn.n_routed_experts * 3 * model.dim * group.ffn.inter_dim
            ffn -= routed - routed // layout.ep
        sizes.append(2 * model.dim + group.attention.num_params(model.dim) + ffn)
    return sizes


def _root_params(model: ModelConfig) -> int:
    """Of what is in no block: embedding, head, last norm."""
    return (1 if model.tie_embeddings else 2) * model.vocab_size * model.dim + model.dim


def _wire(
    model: ModelConfig,
    layout: ParallelConfig,
    dense: int,
    experts: int,
    n_tokens: int,
    micro_batches: int,
    itemsize: int,
) -> Wire:
    exchange = 0
    for count, moe in moes(model):
        rows = round(n_tokens * ranks_reached(moe, layout.ep) * _others(layout.ep))
        counts, fp8 = 16 * (layout.ep - 1), layout.dispatch == "fp8"
        sent = exchange_bytes(model.dim, moe.top_k, rows, itemsize, fp8=fp8)
        exchange += count * (sent + counts)
    root = _root_params(model)
    local = experts // layout.ep
    others, expert_others = _others(layout.shard), _others(layout.expert_shard)
    gather = (2 * (dense - root) + root) * others + 2 * local * expert_others
    scatter = dense * others + local * expert_others
    copies = 2 * dense / layout.shard * _others(layout.world // layout.shard)
    copies += 2 * local / layout.expert_shard * _others(layout.dp // layout.expert_shard)
    parts = {
        "exchange": micro_batches * exchange,
        "gather": round(WIDE * micro_batches * gather),
        "scatter": round(WIDE * micro_batches * scatter),
        "copies": round(WIDE * copies),
    }
    return Wire(**parts, total=sum(parts.values()))


def _others(ranks: int) -> float:
    """The share of a whole that is not one's own."""
    return (ranks - 1) / ranks
