"""Mixture of block attention (MoBA): arXiv:2502.13189, section 2.

Every query head reads few blocks of the past: the one it stands in, and those whose mean key has
the largest product with the query (equations 5 and 6). The choice has no parameters and no
gradient, so a model can be switched from it to full attention at any time.

FlashMoBA (arXiv:2511.11571) found that small blocks choose better, and better still if a short
causal convolution gathers each key's neighbours: ``key_conv_size``.

Shapes: B batch, T new tokens, S all tokens so far, D model dim, H query heads, G key-value heads,
Q head width, F = G Q, E complete blocks so far, N = topk_blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Discriminator
from torch import Tensor, nn

from fathom.attention.base import Attention, AttentionConfig, Selection, attend_visible, raw_scores
from fathom.layers.base import require, require_positive
from fathom.layers.cache import Stream
from fathom.layers.entries import Entries
from fathom.layers.linear import Linear
from fathom.layers.position import NoPositionConfig, RopeConfig
from fathom.layers.rope import Rope
from fathom.layers.step import Step
from fathom.ops.block_attention import block_attention
from fathom.ops.registry import wide
from fathom.ops.rope import rotate
from fathom.ops.selection import select_by_mean


@dataclass(frozen=True, kw_only=True)
class MoBAConfig(AttentionConfig):
    """MoBA; GQA where ``n_kv_heads < n_heads``, every query head still selects on its own.

    Args:
        n_heads: query heads.
        n_kv_heads: key-value heads; query head j reads head ``j // (n_heads / n_kv_heads)``.
        head_dim: width of a head.
        position: rope or none.
        block_size: tokens of a block; the grid restarts at every document.
        topk_blocks: blocks that a query reads, the one it stands in included. With 1 it reads
            that block alone; a document no longer than a block is plain causal attention.
        key_conv_size: tokens of a causal convolution over the keys before they are rotated,
            ``k + silu(conv(k))`` channel by channel; None: none.
        full_from: share of the training steps after which every query reads everything, and so do
            evaluation and generation once trained; None: never.
    """

    kind: Literal["moba"] = "moba"
    n_heads: int
    n_kv_heads: int
    head_dim: int
    position: Annotated[RopeConfig | NoPositionConfig, Discriminator("kind")]
    block_size: int
    topk_blocks: int
    key_conv_size: int | None = None
    full_from: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "n_heads", "n_kv_heads", "head_dim", "block_size", "topk_blocks")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}: "
            "each key-value head serves the same number of query heads",
        )
        require(
            isinstance(self.position, NoPositionConfig) or self.head_dim % 2 == 0,
            f"head_dim must be even under RoPE, which turns pairs of channels, got {self.head_dim}",
        )
        require(
            self.key_conv_size is None or self.key_conv_size >= 2,
            f"key_conv_size must be at least 2, got {self.key_conv_size}: it gathers a key's "
            "neighbours (FlashMoBA uses 3 or 5); leave it out for none",
        )
        require(
            self.full_from is None or 0 <= self.full_from <= 1,
            f"full_from is a share of the training steps, from 0 to 1, got {self.full_from}",
        )

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    def build(self, dim: int) -> "MoBA":
        return MoBA(self, dim)

    def streams(self) -> Sequence[Stream]:
        width = self.kv_width
        streams = [Stream("k", width), Stream("v", width)]
        streams += [Stream("k_mean", width, tokens_per_entry=self.block_size)]
        if self.key_conv_size is not None:
            streams += [Stream("k_conv", width, window=self.key_conv_size - 1)]
        return streams

    def num_params(self, dim: int) -> int:
        projections = dim * (2 * self.n_heads * self.head_dim + 2 * self.kv_width)
        return projections + (self.key_conv_size or 0) * self.kv_width

    def projection_flops(self, dim: int) -> int:
        return 2 * self.num_params(dim)

    def core_flops(self, seq_len: int) -> int:
        """Its blocks, and a product with the mean of each block before; ``full_from`` aside."""
        before, inside = divmod(seq_len - 1, self.block_size)
        read = min(before, self.topk_blocks - 1) * self.block_size + inside + 1
        return 2 * self.n_heads * self.head_dim * (2 * read + before)


class MoBA(Attention):
    """See :class:`MoBAConfig`. ``full`` says whether every query reads everything."""

    def __init__(self, cfg: MoBAConfig, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.full = cfg.full_from is not None  # as at the end of training
        self.wq = Linear(dim, cfg.n_heads * cfg.head_dim)
        self.wk = Linear(dim, cfg.kv_width)
        self.wv = Linear(dim, cfg.kv_width)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, dim)
        self.rope = None
        if isinstance(cfg.position, RopeConfig):
            self.rope = cfg.position.rope(cfg.head_dim)
        if cfg.key_conv_size is not None:
            self.key_conv = nn.Parameter(torch.empty(cfg.key_conv_size, cfg.kv_width))

    def set_progress(self, progress: float) -> bool:
        self.full = self.cfg.full_from is not None and progress >= self.cfg.full_from
        return self.full

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        q_BTHQ, k_BTGQ = self.queries_keys(x_BTD, step)
        names = ("k", "v")
        keys_BS, (k_BSF, v_BSF) = step.append(k_BTGQ.flatten(-2), self.wv(x_BTD), names=names)
        k_BSGQ, v_BSGV = (t.unflatten(-1, (self.cfg.n_kv_heads, -1)) for t in (k_BSF, v_BSF))
        if self.full:
            out_BTHV = attend_visible(q_BTHQ, k_BSGQ, v_BSGV, step, keys_BS, scale=self.scale)
        else:
            out_BTHV = block_attention(
                q_BTHQ,
                k_BSGQ,
                v_BSGV,
                self.starts(q_BTHQ, k_BSF, step),
                step.places("k"),
                block_size=self.cfg.block_size,
                scale=self.scale,
            )
        return self.wo(out_BTHV.flatten(-2))

    @property
    def scale(self) -> float:
        return self.cfg.head_dim**-0.5

    def queries_keys(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Queries ``[B, T, H, Q]`` and keys ``[B, T, G, Q]``, rotated."""
        q_BTHQ = self.wq(x_BTD).unflatten(-1, (self.cfg.n_heads, -1))
        k_BTGQ = self.unrotated_keys(x_BTD, step)
        if self.rope is None:
            return q_BTHQ, k_BTGQ
        angles = step.angles(self.rope)
        return rotate(q_BTHQ, *angles), rotate(k_BTGQ, *angles)

    def unrotated_keys(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Keys ``[B, T, G, Q]``, each with its neighbours gathered if there is a convolution."""
        k_BTF = self.wk(x_BTD)
        if self.cfg.key_conv_size is not None:
            _, (rows_BSF,) = step.append(k_BTF, names=("k_conv",))
            k_BTF = k_BTF + nn.functional.silu(self.convolved(rows_BSF, step))
        return k_BTF.unflatten(-1, (self.cfg.n_kv_heads, -1))

    def convolved(self, rows_BSF: Tensor, step: Step) -> Tensor:
        """``sum_j w_j * k[t - j]`` over the tokens of t's document."""
        places_BT = step.places("k_conv")
        batch = torch.arange(rows_BSF.shape[0], device=rows_BSF.device)[:, None]
        total = rows_BSF.new_zeros(())
        for back, weight_F in enumerate(self.key_conv):
            there_BT1 = (step.positions_BT >= back)[..., None]
            shifted_BTF = rows_BSF[batch, (places_BT - back).clamp(min=0)]
            total = total + weight_F * shifted_BTF.where(there_BT1, 0.0)
        return total

    @torch.no_grad()
    def starts(self, q_BTHQ: Tensor, k_BSF: Tensor, step: Step) -> Tensor:
        """The blocks that each query head reads, int32 ``[B, T, H, N]``."""
        size = self.cfg.block_size
        blocks = Entries.of(step, size, size, "k")
        means_BMF = blocks.tokens(k_BSF).to(wide(k_BSF.dtype)).mean(dim=2).to(k_BSF.dtype)
        (means_BEF,) = blocks.append(step, means_BMF, names=("k_mean",))
        return select_by_mean(
            q_BTHQ,
            means_BEF.unflatten(-1, (self.cfg.n_kv_heads, -1)),
            blocks.lows_BT,
            blocks.lows_BT + (step.positions_BT // size).to(torch.int32),
            step.positions_BT,
            step.places("k"),
            block_size=size,
            topk_blocks=self.cfg.topk_blocks,
        )

    def selection(self, x_BTD: Tensor, step: Step) -> Selection:
        q_BTHQ, k_BTGQ = self.queries_keys(x_BTD, step)
        return Selection(self.starts(q_BTHQ, k_BTGQ.flatten(-2), step), self.cfg.block_size)

    def scores(self, x_BTD: Tensor, step: Step) -> Tensor:
        return raw_scores(*self.queries_keys(x_BTD, step), self.scale, step.mask(None))

    def position_keys(self, x_BTD: Tensor) -> tuple[Tensor, Rope] | None:
        if self.rope is None:
            return None
        return self.unrotated_keys(x_BTD, Step.full(x_BTD[..., 0])), self.rope
