"""Multi-head attention and its shared forms: one file, ``n_kv_heads`` decides.

MHA (arXiv:1706.03762): every query head has its own key-value head. MQA (arXiv:1911.02150): all
share one. GQA (arXiv:2305.13245): groups share one. Sharing shrinks what decoding keeps and reads.
``shared_query`` is the opposite, as a control: one query head looks into many key-value heads.

Shapes: B batch, T new tokens, S all tokens so far, D model dim, H query heads, G key-value heads,
Q query-key width, V value width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fathom.attention.base import Attention, AttentionConfig, attend_visible, raw_scores
from fathom.layers.base import require, require_positive
from fathom.layers.cache import Stream
from fathom.layers.linear import Linear, each_of
from fathom.layers.position import AlibiConfig, AnyPosition, DecoupledRopeConfig, RopeConfig
from fathom.layers.rope import Rope
from fathom.layers.step import Step
from fathom.ops.rope import rotate


@dataclass(frozen=True, kw_only=True)
class MHAConfig(AttentionConfig):
    """MHA (``n_kv_heads == n_heads``), GQA, MQA (``n_kv_heads == 1``).

    Args:
        n_heads: query heads.
        n_kv_heads: key-value heads; query head j reads head ``j // (n_heads / n_kv_heads)``.
        head_dim: width of a head, independent of ``dim / n_heads``.
        position: rope, decoupled_rope, alibi or none.
        shared_query: project one query head and use it for all ``n_heads``.
        window_size: see only so many of the newest tokens, oneself included; None: all.
        qkv_bias: biases on the query, key and value projections.
        out_bias: a bias on the output projection.
    """

    kind: Literal["mha"] = "mha"
    n_heads: int
    n_kv_heads: int
    head_dim: int
    position: AnyPosition
    shared_query: bool = False
    window_size: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "n_heads", "n_kv_heads", "head_dim", "window_size")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}: "
            "each key-value head serves the same number of query heads",
        )
        require(
            type(self.position) is not RopeConfig or self.head_dim % 2 == 0,
            f"head_dim must be even under RoPE, which turns pairs of channels, got {self.head_dim}",
        )

    @property
    def rope_head_dim(self) -> int:
        """Further channels that carry position alone (decoupled RoPE), else 0."""
        position = self.position
        return position.rope_head_dim if isinstance(position, DecoupledRopeConfig) else 0

    @property
    def n_query_projections(self) -> int:
        return 1 if self.shared_query else self.n_heads

    def build(self, dim: int) -> "MHA":
        return MHA(self, dim)

    def streams(self) -> Sequence[Stream]:
        width = self.n_kv_heads * self.head_dim
        streams = [Stream("k", width, window=self.window_size)]
        streams += [Stream("v", width, window=self.window_size)]
        if self.rope_head_dim:
            streams += [Stream("k_rope", self.rope_head_dim, window=self.window_size)]
        return streams

    def num_params(self, dim: int) -> int:
        qkv = (self.n_query_projections + 2 * self.n_kv_heads) * self.head_dim
        rope = (self.n_query_projections + 1) * self.rope_head_dim
        biases = self.qkv_bias * qkv + self.out_bias * dim
        return dim * (qkv + rope + self.n_heads * self.head_dim) + biases

    def projection_flops(self, dim: int) -> int:
        qkv = (self.n_query_projections + 2 * self.n_kv_heads) * self.head_dim
        rope = (self.n_query_projections + 1) * self.rope_head_dim
        return 2 * dim * (qkv + rope + self.n_heads * self.head_dim)

    def core_flops(self, seq_len: int) -> int:
        seen = min(seq_len, self.window_size or seq_len)
        return 2 * self.n_heads * seen * (2 * self.head_dim + self.rope_head_dim)


class MHA(Attention):
    """See :class:`MHAConfig`."""

    def __init__(self, cfg: MHAConfig, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        kv_width = cfg.n_kv_heads * cfg.head_dim
        self.wq = Linear(dim, cfg.n_query_projections * cfg.head_dim, bias=cfg.qkv_bias)
        self.wk = Linear(dim, kv_width, bias=cfg.qkv_bias)
        self.wv = Linear(dim, kv_width, bias=cfg.qkv_bias)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, dim, bias=cfg.out_bias)
        self.rope = None
        if isinstance(cfg.position, RopeConfig):
            self.rope = cfg.position.rope(cfg.rope_head_dim or cfg.head_dim)
        if cfg.rope_head_dim:
            self.wq_rope = Linear(dim, cfg.n_query_projections * cfg.rope_head_dim)
            self.wk_rope = Linear(dim, cfg.rope_head_dim)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        return self.wo(self.heads(x_BTD, step).flatten(-2))

    def heads(self, x_BTD: Tensor, step: Step) -> Tensor:
        """What every head read, ``[B, T, H, V]``."""
        q_BTHQ, *new = self.queries_keys_values(x_BTD, step)
        keys_BS, (k_BSF, v_BSF, *k_rope) = step.append(*new)
        k_BSGQ = self.whole_keys(k_BSF, *k_rope)
        v_BSGV = v_BSF.unflatten(-1, (self.cfg.n_kv_heads, -1))
        return attend_visible(
            *(q_BTHQ, k_BSGQ, v_BSGV, step, keys_BS),
            scale=self.scale,
            window_size=self.cfg.window_size,
            slopes_H=self.slopes(step),
        )

    def whole_keys(self, k_BSF: Tensor, k_rope_BSR: Tensor | None = None) -> Tensor:
        """Keys by head, ``[B, S, G, Q]``.

        A position key, one for all heads, becomes further channels: the score gains a bias.
        """
        k_BSGQ = k_BSF.unflatten(-1, (self.cfg.n_kv_heads, -1))
        if k_rope_BSR is None:
            return k_BSGQ
        shared_BSGR = k_rope_BSR[:, :, None].expand(-1, -1, self.cfg.n_kv_heads, -1)
        return torch.cat([k_BSGQ, shared_BSGR], dim=-1)

    def scores(self, x_BTD: Tensor, step: Step) -> Tensor:
        q_BTHQ, k_BSF, _, *k_rope = self.queries_keys_values(x_BTD, step)
        mask = step.mask(None, window_size=self.cfg.window_size, slopes_H=self.slopes(step))
        return raw_scores(q_BTHQ, self.whole_keys(k_BSF, *k_rope), self.scale, mask)

    def position_keys(self, x_BTD: Tensor) -> tuple[Tensor, Rope] | None:
        if self.rope is None:
            return None
        if self.cfg.rope_head_dim:
            return self.wk_rope(x_BTD)[:, :, None], self.rope
        return self.wk(x_BTD).unflatten(-1, (self.cfg.n_kv_heads, -1)), self.rope

    @property
    def scale(self) -> float:
        return (self.cfg.head_dim + self.cfg.rope_head_dim) ** -0.5

    def queries_keys_values(self, x_BTD: Tensor, step: Step) -> list[Tensor]:
        """Queries ``[B, T, H, Q]``, then what the cache keeps: k, v, and a position key if any."""
        cfg = self.cfg
        q_BTF, k_BTF, v_BTF = each_of(x_BTD, self.wq, self.wk, self.wv)
        q_BTHQ = q_BTF.unflatten(-1, (cfg.n_query_projections, -1))
        k_BTGQ = k_BTF.unflatten(-1, (cfg.n_kv_heads, -1))
        position_keys = []
        if self.rope is not None:
            angles = step.angles(self.rope)
            if cfg.rope_head_dim:
                q_rope = self.wq_rope(x_BTD).unflatten(-1, (cfg.n_query_projections, -1))
                q_BTHQ = torch.cat([q_BTHQ, rotate(q_rope, *angles)], dim=-1)
                position_keys = [rotate(self.wk_rope(x_BTD)[:, :, None], *angles).flatten(-2)]
            else:
                q_BTHQ, k_BTGQ = rotate(q_BTHQ, *angles), rotate(k_BTGQ, *angles)
        q_BTHQ = q_BTHQ.expand(-1, -1, cfg.n_heads, -1)
        return [q_BTHQ, k_BTGQ.flatten(-2), v_BTF, *position_keys]

    def slopes(self, step: Step) -> Tensor | None:
        """ALiBi's, ``[H]``, if that is the position."""
        if not isinstance(self.cfg.position, AlibiConfig):
            return None
        return self.cfg.position.slopes(self.cfg.n_heads).to(step.positions_BT.device)
