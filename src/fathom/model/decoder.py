"""The model: embed, blocks, norm, head. The forward to read first.

A Llama-like and a DeepSeek-like transformer differ only in what their layer groups plug in here.

Shapes: B batch, T new tokens, D model dim, V vocabulary.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fathom.attention import Attention
from fathom.config import ModelConfig
from fathom.ffn import Routing
from fathom.ffn.moe import MoE
from fathom.layers.cache import Cache
from fathom.layers.linear import Embedding, Linear
from fathom.layers.norm import RMSNorm
from fathom.layers.step import Step
from fathom.model.block import Block, BlockOutput
from fathom.model.mtp import IGNORE, MTPModule, MTPOutput, targets_ahead
from fathom.ops.cross_entropy import linear_cross_entropy, token_cross_entropy
from fathom.ops.linear import linear


@dataclass
class Hidden:
    """What the blocks give: states after and before the final norm; of each MoE layer its routing,
    of each indexer its loss."""

    states_BTD: Tensor
    before_norm_BTD: Tensor
    routing: list[Routing]
    index_losses: list[Tensor]


@dataclass
class Losses:
    """Losses of one batch, scalars in nats per token.

    Args:
        total: what to backpropagate: ``main`` + weighted ``mtp`` + ``balance`` + ``index``.
        main: cross-entropy of the next token.
        mtp: mean cross-entropy over MTP depths, unweighted; 0 without MTP.
        balance: the balance losses, already weighted.
        index: what trains the indexers, already weighted; 0 without any.
        routing: one per MoE layer, the main layers first, then MTP's.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    index: Tensor
    routing: list[Routing]


class Decoder(nn.Module):
    """A decoder-only transformer; see :class:`fathom.config.ModelConfig`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.checkpoint_blocks = False  # recompute each block in the backward, to save memory
        self.embed = Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(group, cfg.dim, cfg.norm_eps) for group in cfg.layers())
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else Linear(cfg.dim, cfg.vocab_size)
        depth = 0 if cfg.mtp is None else cfg.mtp.n_mtp_modules
        self.mtp = nn.ModuleList(MTPModule(cfg) for _ in range(depth))

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        starts_B: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, T, V]`` for int64 tokens, in training, prefill and decode alike.

        Args:
            tokens_BT: the new tokens.
            cu_seqlens: borders of packed documents (:meth:`Step.full`); not with a cache.
            cache: the tokens so far; the new ones are added to it.
            starts_B: with a cache, each row's next position where rows have unequal lengths.
        """
        if cache is None:
            return self.logits(self.hidden(tokens_BT, Step.full(tokens_BT, cu_seqlens)).states_BTD)
        if cu_seqlens is not None:
            raise ValueError("a cache holds one document a row: pass cu_seqlens or cache, not both")
        step = Step.cached(tokens_BT, cache, starts_B)
        if step.total > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.capacity} tokens and {step.total} are needed: "
                "make it larger, or generate less"
            )
        states_BTD = self.hidden(tokens_BT, step, cache).states_BTD
        cache.length = step.total
        return self.logits(states_BTD)

    def hidden(self, tokens_BT: Tensor, step: Step, cache: Cache | None = None) -> Hidden:
        """Run the blocks and the final norm."""
        x_BTD = self.embed(tokens_BT)
        routing, index_losses, selected_BTN = [], [], None
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.prepare(step)
        for index, block in enumerate(self.blocks):
            layer_step = step.at(None if cache is None else cache.layers[index], selected_BTN)
            x_BTD, routed, indexing = self._run(block, x_BTD, layer_step)
            routing += [] if routed is None else [routed]
            if indexing is not None:
                selected_BTN = indexing.selected_BTN
                index_losses += [] if indexing.loss is None else [indexing.loss]
        return Hidden(self.norm(x_BTD), x_BTD, routing, index_losses)

    def _run(self, block: nn.Module, x_BTD: Tensor, step: Step) -> BlockOutput:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            result = checkpoint(  # nothing in a block draws random numbers
                block, x_BTD, step, use_reentrant=False, preserve_rng_state=False
            )
            assert isinstance(result, BlockOutput)
            return result
        return block(x_BTD, step)

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, states_BTD: Tensor) -> Tensor:
        """The head on states after a final norm: ``[B, T, V]``."""
        return linear(states_BTD, self.head_weight)

    def predict_ahead(
        self, tokens_BT: Tensor, hidden: Hidden, step: Step
    ) -> Iterator[tuple[int, MTPOutput]]:
        """Run the MTP modules: ``(depth, output)``, whose states have ``T - depth`` positions."""
        assert self.cfg.mtp is not None or not self.mtp
        state, before_norm = hidden.states_BTD, hidden.before_norm_BTD
        for depth, module in enumerate(self.mtp, start=1):
            previous = state if self.cfg.mtp and self.cfg.mtp.post_norm_hidden else before_norm
            embedded = self.embed(tokens_BT[:, depth:])
            assert isinstance(module, MTPModule)
            shorter = step.shorter(depth)
            module.block.attention.prepare(shorter)
            output = module(embedded, previous[:, :-1], shorter)
            yield depth, output
            state, before_norm = output.states_BTD, output.before_norm_BTD

    def mtp_logits(self, tokens_BT: Tensor, cu_seqlens: Tensor | None = None) -> list[Tensor]:
        """Logits of every MTP depth k, ``[B, T - k, V]``: at i they predict token ``i + k + 1``."""
        step = Step.full(tokens_BT, cu_seqlens)
        outputs = self.predict_ahead(tokens_BT, self.hidden(tokens_BT, step), step)
        return [self.logits(output.states_BTD) for _, output in outputs]

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        progress: float = 0.0,
        denominator: int | Tensor | None = None,
        share: float = 1.0,
        counts_before: Sequence[Tensor] = (),
    ) -> Losses:
        """The training losses of one micro-batch.

        Args:
            tokens_BT: inputs.
            targets_BT: the next token of each, -100 where there is none.
            cu_seqlens: borders of packed documents.
            progress: share of training done, 0 to 1, for MTP's weight and attentions' schedules.
            denominator: valid targets of the whole optimizer step, so that the micro-batches of
                an accumulation add up to one mean; None: those of this batch.
            share: of the step's tokens that this micro-batch has, for the balance losses.
            counts_before: tokens per expert of the step's earlier micro-batches, of every MoE
                layer, for the balance losses that count over the step; empty: none.
        """
        for (_, moe), counts_E in zip_longest(self.moe_layers(), counts_before):
            moe.counts_before = counts_E
        coeff, _ = self.phase(progress)
        step = Step.full(tokens_BT, cu_seqlens)
        hidden = self.hidden(tokens_BT, step)
        count = denominator
        if count is None:
            count = (targets_BT != IGNORE).sum().clamp(min=1)
        main = self._cross_entropy(hidden.states_BTD, targets_BT) / count
        routing, index_losses = list(hidden.routing), list(hidden.index_losses)
        depth_losses = []
        for depth, output in self.predict_ahead(tokens_BT, hidden, step):
            ahead = targets_ahead(targets_BT, step.positions_BT, depth)
            depth_losses.append(self._cross_entropy(output.states_BTD, ahead) / count)
            routing += [] if output.routing is None else [output.routing]
            if output.indexing is not None and output.indexing.loss is not None:
                index_losses.append(output.indexing.loss)
        mtp = torch.stack(depth_losses).mean() if depth_losses else main.new_zeros(())
        zero = main.new_zeros(())
        balance = sum((routed.balance_loss * share for routed in routing), start=zero)
        index = sum((loss * share for loss in index_losses), start=zero)
        total = main + coeff * mtp + balance + index
        return Losses(total, main, mtp, balance, index, routing)

    def phase(self, progress: float) -> tuple[float, tuple[Hashable, ...]]:
        """Bring what follows a schedule to ``progress``: MTP's weight, and how attentions read."""
        coeff = 0.0 if self.cfg.mtp is None else self.cfg.mtp.loss_coeff(progress)
        return coeff, tuple(attention.set_progress(progress) for attention in self.attentions())

    def _cross_entropy(self, states_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        return linear_cross_entropy(
            states_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten()
        )

    @torch.no_grad()
    def token_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Nats of each target, ``[B, T]`` float32, 0 where the target is -100. For evaluation."""
        states_BTD = self.hidden(tokens_BT, Step.full(tokens_BT, cu_seqlens)).states_BTD
        flat = token_cross_entropy(states_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten())
        return flat.view_as(targets_BT)

    def attentions(self) -> list[Attention]:
        """Of every layer, the main ones first, then MTP's."""
        return [part for part in self.modules() if isinstance(part, Attention)]

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Every MoE with its name, in the order of ``Losses.routing``."""
        return [(name, part) for name, part in self.named_modules() if isinstance(part, MoE)]

    def update_expert_bias(self, counts: Sequence[Tensor]) -> None:
        """Move the routing biases by the counts of a whole optimizer step, one per MoE layer."""
        for (_, moe), counts_E in zip(self.moe_layers(), counts, strict=True):
            moe.update_expert_bias(counts_E)

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """An empty cache for this model, by default on its device and in its dtype."""
        weight = self.embed.weight
        return Cache(
            [group.attention.streams() for group in self.cfg.layers()],
            batch_size=batch_size,
            capacity=capacity,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )
