"""Native sparse attention (NSA): arXiv:2502.11089, section 3.

Every query looks three times: at *compressed* keys, one for each ``cmp_stride`` tokens, that show
the whole past coarsely; at the few *selected* blocks that the first look found most important, in
full; and at a *window* of the newest tokens. Each look has a softmax of its own; learned gates add
the three (equation 5). The heads of a group select together, so that they read the same keys.

Shapes: B batch, T new tokens, S all tokens so far, D model dim, H query heads, G key-value heads,
Q query-key width, V value width, M compressed entries made in this step, E all entries so far, L
tokens of an entry, N = topk_blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Discriminator
from torch import Tensor, nn

from fathom.attention.base import Attention, AttentionConfig, Selection, raw_scores
from fathom.layers.base import require, require_positive
from fathom.layers.cache import Stream
from fathom.layers.entries import Entries
from fathom.layers.linear import Linear
from fathom.layers.position import NoPositionConfig, RopeConfig
from fathom.layers.rope import Rope
from fathom.layers.step import Step
from fathom.ops.block_attention import block_attention
from fathom.ops.range_attention import range_attention, range_attention_with_sums
from fathom.ops.rope import rotate
from fathom.ops.selection import select_by_importance

Compression = Literal["mlp", "mean", "weighted"]


@dataclass(frozen=True, kw_only=True)
class NSAConfig(AttentionConfig):
    """NSA.

    Args:
        n_heads: query heads.
        n_kv_heads: key-value heads; query head j reads head ``j // (n_heads / n_kv_heads)``.
        head_dim: width of a query or key head.
        v_head_dim: width of a value head; None: ``head_dim``.
        position: rope or none.
        cmp_block_size: tokens that a compressed key stands for (the paper's l).
        cmp_stride: tokens from one compressed key to the next (d).
        block_size: tokens of a selectable block (l').
        topk_blocks: blocks that a query selects, the forced ones included (n).
        n_initial_blocks: the first blocks of a document are always selected ...
        n_local_blocks: ... and so are the newest, the one a query stands in included.
        window_size: newest tokens that the window branch sees, oneself included (w).
        share_kv: one key and value projection for all branches; the paper gives each its own, so
            that none learns at another's cost.
        compression: how tokens become one: ``mean``; ``weighted``, a learned average; ``mlp``, the
            mean and what an MLP that knows each token's place in the block adds to it.
        compress_rotated: compress keys that RoPE has turned already; else the compressed key is
            turned, by the position of its first token.
        gate_per: gates for every ``head``, or for a ``token``, the same for all heads.
    """

    kind: Literal["nsa"] = "nsa"
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    position: Annotated[RopeConfig | NoPositionConfig, Discriminator("kind")]
    cmp_block_size: int = 32
    cmp_stride: int = 16
    block_size: int = 64
    topk_blocks: int = 16
    n_initial_blocks: int = 1
    n_local_blocks: int = 2
    window_size: int = 512
    share_kv: bool = False
    compression: Compression = "mlp"
    compress_rotated: bool = False
    gate_per: Literal["head", "token"] = "head"

    def __post_init__(self) -> None:
        require_positive(self, "n_heads", "n_kv_heads", "head_dim", "v_head_dim")
        require_positive(self, "cmp_block_size", "cmp_stride", "block_size", "window_size")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}: "
            "each key-value head serves the same number of query heads",
        )
        require(
            isinstance(self.position, NoPositionConfig) or self.head_dim % 2 == 0,
            f"head_dim must be even under RoPE, which turns pairs of channels, got {self.head_dim}",
        )
        for field in ("cmp_block_size", "block_size"):
            require(
                getattr(self, field) % self.cmp_stride == 0,
                f"{field} must be a multiple of cmp_stride, got {getattr(self, field)} and "
                f"{self.cmp_stride}: what a block weighs is counted in whole strides",
            )
        require(
            self.n_local_blocks >= 1 and self.n_initial_blocks >= 0,
            "n_local_blocks must be at least 1, the block a query stands in, and n_initial_blocks "
            f"at least 0, got {self.n_local_blocks} and {self.n_initial_blocks}",
        )
        require(
            self.topk_blocks >= self.n_initial_blocks + self.n_local_blocks,
            f"topk_blocks must hold the {self.n_initial_blocks} initial and {self.n_local_blocks} "
            f"local blocks, got {self.topk_blocks}",
        )

    @property
    def value_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def n_projections(self) -> int:
        """Key and value projections: one for each branch, or one for all."""
        return 1 if self.share_kv else 3

    @property
    def n_gates(self) -> int:
        return 3 * self.n_heads if self.gate_per == "head" else 3

    def build(self, dim: int) -> "NSA":
        return NSA(self, dim)

    def streams(self) -> Sequence[Stream]:
        """Selected keys whole; compressed ones, and the tokens the next is made of; the window."""
        widths = {"k": self.n_kv_heads * self.head_dim, "v": self.n_kv_heads * self.value_dim}

        def both(suffix: str, stride: int = 1, window: int | None = None) -> list[Stream]:
            return [
                Stream(name + suffix, width, tokens_per_entry=stride, window=window)
                for name, width in widths.items()
            ]

        streams = both("") + both("_cmp", stride=self.cmp_stride)
        streams += both("_tail", window=self.cmp_block_size)
        return streams if self.share_kv else streams + both("_win", window=self.window_size)

    def num_params(self, dim: int) -> int:
        heads = self.n_heads + self.n_projections * self.n_kv_heads
        widths = self.head_dim, self.value_dim
        compressors = sum(self._compressor_params(width) for width in widths)
        return dim * heads * sum(widths) + (dim + 1) * self.n_gates + compressors

    def _compressor_params(self, width: int) -> int:
        learned = {
            "mean": 0,
            "weighted": self.n_kv_heads * self.cmp_block_size,
            "mlp": self.cmp_block_size * width * (1 + width) + width**2,
        }
        return learned[self.compression]

    def projection_flops(self, dim: int) -> int:
        heads = self.n_heads + self.n_projections * self.n_kv_heads
        widths = self.head_dim, self.value_dim
        mlps = sum(self.n_kv_heads * (self.cmp_block_size + 1) * width**2 for width in widths)
        compression = 2 * mlps // self.cmp_stride if self.compression == "mlp" else 0
        return 2 * dim * (heads * sum(widths) + self.n_gates) + compression

    def core_flops(self, seq_len: int) -> int:
        """Three branches, and the compressed scores once more to select by."""
        entries = max((seq_len - self.cmp_block_size) // self.cmp_stride + 1, 0)
        before, inside = divmod(seq_len - 1, self.block_size)
        selected = min(before, self.topk_blocks - 1) * self.block_size + inside + 1
        read = entries + selected + min(seq_len, self.window_size)
        widths = self.head_dim + self.value_dim
        return 2 * self.n_heads * (widths * read + self.head_dim * entries)


class Compressor(nn.Module):
    """The L vectors of a block as one: see ``NSAConfig.compression``."""

    def __init__(self, cfg: NSAConfig, width: int) -> None:
        super().__init__()
        self.kind, size = cfg.compression, cfg.cmp_block_size
        if self.kind == "weighted":
            self.weight_bias = nn.Parameter(torch.empty(cfg.n_kv_heads, size))  # 0: the mean
        elif self.kind == "mlp":
            self.place_bias = nn.Parameter(torch.empty(size, width))
            self.up = Linear(size * width, width)
            self.down = Linear(width, width)

    def forward(self, x_BMLGW: Tensor) -> Tensor:
        if self.kind == "weighted":
            return torch.einsum("bmlgw,gl->bmgw", x_BMLGW, self.weight_bias.softmax(-1))
        mean_BMGW = x_BMLGW.mean(dim=2)
        if self.kind == "mean":
            return mean_BMGW
        placed = (x_BMLGW + self.place_bias[:, None]).transpose(2, 3).flatten(-2)
        return mean_BMGW + self.down(nn.functional.silu(self.up(placed)))


class NSA(Attention):
    """See :class:`NSAConfig`."""

    def __init__(self, cfg: NSAConfig, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        groups = cfg.n_projections * cfg.n_kv_heads
        self.wq = Linear(dim, cfg.n_heads * cfg.head_dim)
        self.wk = Linear(dim, groups * cfg.head_dim)
        self.wv = Linear(dim, groups * cfg.value_dim)
        self.wo = Linear(cfg.n_heads * cfg.value_dim, dim)
        self.gate = Linear(dim, cfg.n_gates, bias=True)
        self.cmp_k = Compressor(cfg, cfg.head_dim)
        self.cmp_v = Compressor(cfg, cfg.value_dim)
        self.rope = None
        if isinstance(cfg.position, RopeConfig):
            self.rope = cfg.position.rope(cfg.head_dim)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        gates_BTC1 = self.gate(x_BTD).sigmoid().unflatten(-1, (-1, 3, 1))  # C: H heads, or 1
        gates = gates_BTC1.unbind(-2)
        branches = self.branches(x_BTD, step)
        out_BTHV = sum(gate * out for gate, out in zip(gates, branches, strict=True))
        assert isinstance(out_BTHV, Tensor)
        return self.wo(out_BTHV.flatten(-2))  # eq. 5

    def branches(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """What the compressed, the selected and the window branch read, ``[B, T, H, V]`` each."""
        q_BTHQ = self.queries(x_BTD, step)
        (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = self.keys_values(x_BTD, step)
        entries, k_BEGQ, v_BEGV = self.compressed(k_cmp, v_cmp, step)
        k_slc, v_slc = self.kept(k_slc, v_slc, step, ("k", "v"))
        window = "k" if self.cfg.share_kv else "k_win"
        if self.cfg.share_kv:
            k_win, v_win = k_slc, v_slc
        else:
            k_win, v_win = self.kept(k_win, v_win, step, ("k_win", "v_win"))
        highs_BT = (step.places(window) + 1).to(torch.int32)
        lows_BT = highs_BT - (step.positions_BT + 1).clamp(max=self.cfg.window_size)
        out_cmp, lse_BTH = range_attention_with_sums(
            q_BTHQ, k_BEGQ, v_BEGV, entries.lows_BT, entries.highs_BT, scale=self.scale
        )
        return (
            out_cmp,
            block_attention(
                q_BTHQ,
                k_slc,
                v_slc,
                self.starts(q_BTHQ, k_BEGQ, entries, step, lse_BTH),
                step.places("k"),
                block_size=self.cfg.block_size,
                scale=self.scale,
            ),
            range_attention(
                q_BTHQ, k_win, v_win, lows_BT.to(torch.int32), highs_BT, scale=self.scale
            ),
        )

    @property
    def scale(self) -> float:
        return self.cfg.head_dim**-0.5

    def queries(self, x_BTD: Tensor, step: Step) -> Tensor:
        return self.rotated(self.wq(x_BTD).unflatten(-1, (self.cfg.n_heads, -1)), step)

    def keys_values(self, x_BTD: Tensor, step: Step) -> list[tuple[Tensor, Tensor]]:
        """``([B, T, G, Q], [B, T, G, V])`` of each branch; those to compress perhaps unrotated."""
        cfg = self.cfg
        k_BTCGQ = self.wk(x_BTD).unflatten(-1, (-1, cfg.n_kv_heads, cfg.head_dim))
        v_BTCGV = self.wv(x_BTD).unflatten(-1, (-1, cfg.n_kv_heads, cfg.value_dim))
        k_cmp, *keys = k_BTCGQ.unbind(2)
        keys = [self.rotated(k, step) for k in keys or [k_cmp]]
        if cfg.compress_rotated:
            k_cmp = keys[0] if cfg.share_kv else self.rotated(k_cmp, step)
        values = v_BTCGV.unbind(2)
        if cfg.share_kv:
            keys, values = keys * 2, values * 3
        return list(zip([k_cmp, *keys], values, strict=True))

    def rotated(self, x_BTGQ: Tensor, step: Step) -> Tensor:
        if self.rope is None:
            return x_BTGQ
        return rotate(x_BTGQ, *step.angles(self.rope))

    def kept(
        self, k_BTGQ: Tensor, v_BTGV: Tensor, step: Step, names: tuple[str, str]
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, ``[B, S, G, Q]`` and ``[B, S, G, V]``."""
        _, (k, v) = step.append(k_BTGQ.flatten(-2), v_BTGV.flatten(-2), names=names)
        return k.unflatten(-1, k_BTGQ.shape[2:]), v.unflatten(-1, v_BTGV.shape[2:])

    def compressed(
        self, k_BTGQ: Tensor, v_BTGV: Tensor, step: Step
    ) -> tuple[Entries, Tensor, Tensor]:
        """The entries, their keys ``[B, E, G, Q]`` and values ``[B, E, G, V]`` (eq. 7)."""
        cfg = self.cfg
        _, tails = step.append(k_BTGQ.flatten(-2), v_BTGV.flatten(-2), names=("k_tail", "v_tail"))
        entries = Entries.of(step, cfg.cmp_block_size, cfg.cmp_stride, "k_tail")
        k_BMLGQ, v_BMLGV = (entries.tokens(t).unflatten(-1, (cfg.n_kv_heads, -1)) for t in tails)
        k_BMGQ, v_BMGV = self.cmp_k(k_BMLGQ), self.cmp_v(v_BMLGV)
        if self.rope is not None and not cfg.compress_rotated:
            k_BMGQ = rotate(k_BMGQ, *self.rope.angles(entries.positions_BM, step.total))
        kept = entries.append(
            step, k_BMGQ.flatten(-2), v_BMGV.flatten(-2), names=("k_cmp", "v_cmp")
        )
        k_BEGQ, v_BEGV = (t.unflatten(-1, (cfg.n_kv_heads, -1)) for t in kept)
        return entries, k_BEGQ, v_BEGV

    def starts(
        self,
        q_BTHQ: Tensor,
        k_BEGQ: Tensor,
        entries: Entries,
        step: Step,
        lse_BTH: Tensor | None = None,
    ) -> Tensor:
        """The blocks that each group reads, int32 ``[B, T, G, N]`` (eq. 8 to 12)."""
        cfg = self.cfg
        return select_by_importance(
            q_BTHQ,
            k_BEGQ,
            entries.lows_BT,
            entries.highs_BT,
            step.positions_BT,
            step.places("k"),
            scale=self.scale,
            cmp_block_size=cfg.cmp_block_size,
            cmp_stride=cfg.cmp_stride,
            block_size=cfg.block_size,
            topk_blocks=cfg.topk_blocks,
            n_initial=cfg.n_initial_blocks,
            n_local=cfg.n_local_blocks,
            lse_BTH=lse_BTH,
        )

    def selection(self, x_BTD: Tensor, step: Step) -> Selection:
        q_BTHQ = self.queries(x_BTD, step)
        entries, k_BEGQ, _ = self.compressed(*self.keys_values(x_BTD, step)[0], step)
        return Selection(self.starts(q_BTHQ, k_BEGQ, entries, step), self.cfg.block_size)

    def scores(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Of the selected branch, over every key that it could have selected."""
        k_BTGQ, _ = self.keys_values(x_BTD, step)[1]
        return raw_scores(self.queries(x_BTD, step), k_BTGQ, self.scale, step.mask(None))

    def position_keys(self, x_BTD: Tensor) -> tuple[Tensor, Rope] | None:
        if self.rope is None:
            return None
        k_BTCGQ = self.wk(x_BTD).unflatten(-1, (-1, self.cfg.n_kv_heads, self.cfg.head_dim))
        return k_BTCGQ[:, :, self.cfg.n_projections // 2], self.rope  # of the selected branch
