"""Multi-head latent attention (MLA): DeepSeek-V2, arXiv:2405.04434, section 2.1.

Keys and values are rebuilt from one latent per token, so the cache holds
``kv_lora_rank + qk_rope_head_dim`` numbers per token, whatever ``n_heads`` is. Position is
decoupled: one rotated key, shared by all heads, adds to the score beside the content.

Two forms of the same algebra. *Expanded*: rebuild every head's keys and values from the latents,
then attend. *Absorbed*: fold the up-projections into query and output and attend to the latents
themselves, as one key-value head of width C + R. ``use_absorbed`` says which is used when.

Shapes: B batch, T new tokens, S all tokens so far, D model dim, H heads, C latent,
K nope head dim, R rope head dim, Q = K + R, V value head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fathom.attention.base import Attention, AttentionConfig, attend_visible, raw_scores
from fathom.layers.base import require, require_positive
from fathom.layers.cache import Stream
from fathom.layers.linear import Linear
from fathom.layers.norm import RMSNorm
from fathom.layers.position import RopeConfig
from fathom.layers.rope import Rope
from fathom.layers.step import Step
from fathom.ops.rope import rotate

Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # an attention of queries, keys and values
INNER_NORM_EPS = 1e-6  # of q_norm and kv_norm in every release, whatever the model's norm_eps


@dataclass(frozen=True, kw_only=True)
class MLAConfig(AttentionConfig):
    """MLA.

    Args:
        n_heads: heads.
        q_lora_rank: width of the compressed query; None: queries are not compressed.
        kv_lora_rank: width C of the cached latent.
        qk_nope_head_dim: content width of a head's query and key.
        qk_rope_head_dim: position width of a head's query; its key is shared by all heads.
        v_head_dim: value width of a head.
        position: the rotation of the position part.
        bias: biases on the two down-projections and the output, as DeepSeek's ``attention_bias``.
        absorb: ``auto`` takes the cheaper form, ``always`` and ``never`` force one.
    """

    kind: Literal["mla"] = "mla"
    n_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    position: RopeConfig
    bias: bool = False
    absorb: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        require_positive(
            self, "n_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"
        )
        require(
            self.qk_rope_head_dim >= 2 and self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim must be even and at least 2, got {self.qk_rope_head_dim}: "
            "RoPE turns pairs of channels (DeepSeek-V3 uses 64)",
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def build(self, dim: int) -> "MLA":
        return MLA(self, dim)

    def streams(self) -> Sequence[Stream]:
        """All that decoding must keep: one latent and one rotated key per token."""
        return [Stream("latent", self.kv_lora_rank), Stream("k_rope", self.qk_rope_head_dim)]

    def _matrix_params(self, dim: int) -> int:
        query = self.n_heads * self.qk_head_dim
        rank = self.q_lora_rank
        queries = dim * query if rank is None else rank * (dim + query)
        up = self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        latents = dim * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank * up
        return queries + latents + self.n_heads * self.v_head_dim * dim

    def num_params(self, dim: int) -> int:
        norms = self.kv_lora_rank + (self.q_lora_rank or 0)
        down = (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim
        return self._matrix_params(dim) + norms + self.bias * (down + dim)

    def projection_flops(self, dim: int) -> int:
        return 2 * self._matrix_params(dim)

    def core_flops(self, seq_len: int) -> int:
        """Of the expanded form, as in training and prefill."""
        return 2 * self.n_heads * seq_len * (self.qk_head_dim + self.v_head_dim)

    def use_absorbed(self, n_new: int, n_total: int, *, cached: bool) -> bool:
        """The one definition of which form runs, by multiply-adds per head.

        Expanded rebuilds all ``n_total`` keys and values; absorbed pays ``2C + R`` instead of
        ``K + R + V`` per score. So absorbed wins when few new tokens read a long cache.
        """
        if self.absorb != "auto":
            return self.absorb == "always"
        if not cached:
            return False
        rebuild = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        expanded = n_total * rebuild + n_new * n_total * (self.qk_head_dim + self.v_head_dim)
        latent_pair = 2 * self.kv_lora_rank + self.qk_rope_head_dim
        return n_new * rebuild + n_new * n_total * latent_pair < expanded


class MLA(Attention):
    """See :class:`MLAConfig`."""

    def __init__(self, cfg: MLAConfig, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        query_width = cfg.n_heads * cfg.qk_head_dim
        if cfg.q_lora_rank is None:
            self.wq = Linear(dim, query_width)
        else:
            self.wq_a = Linear(dim, cfg.q_lora_rank, bias=cfg.bias)
            self.q_norm = RMSNorm(cfg.q_lora_rank, INNER_NORM_EPS)
            self.wq_b = Linear(cfg.q_lora_rank, query_width)
        self.wkv_a = Linear(dim, cfg.kv_lora_rank + cfg.qk_rope_head_dim, bias=cfg.bias)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, INNER_NORM_EPS)
        self.wkv_b = Linear(cfg.kv_lora_rank, cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.wo = Linear(cfg.n_heads * cfg.v_head_dim, dim, bias=cfg.bias)
        self.rope = cfg.position.rope(cfg.qk_rope_head_dim)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        angles = step.angles(self.rope)
        q_BTHQ = self.queries(self.query_latent(x_BTD), angles)
        keys_BS, (latent_BSC, k_rope_BSR) = step.append(*self.latents(x_BTD, angles))
        mixed_BTHV = self.read(q_BTHQ, latent_BSC, k_rope_BSR, keys_BS, step)
        return self.wo(mixed_BTHV.flatten(-2))  # eq. 19

    def read(
        self,
        q_BTHQ: Tensor,
        latent_BSC: Tensor,
        k_rope_BSR: Tensor,
        keys_BS: Tensor | None,
        step: Step,
    ) -> Tensor:
        """Attend to every visible token, in the cheaper form: ``[B, T, H, V]``."""
        core = partial(attend_visible, step=step, keys_BS=keys_BS, scale=self.scale)
        n_new, n_total = q_BTHQ.shape[1], latent_BSC.shape[1]
        if self.cfg.use_absorbed(n_new, n_total, cached=step.cache is not None):
            return self.absorbed(q_BTHQ, latent_BSC, k_rope_BSR, core)
        return self.expanded(q_BTHQ, latent_BSC, k_rope_BSR, core)

    @property
    def scale(self) -> float:
        """``1 / sqrt(K + R)``, times DeepSeek's correction under YaRN."""
        scaling = self.cfg.position.scaling
        correction = 1.0 if scaling is None else scaling.softmax_factor
        return self.cfg.qk_head_dim**-0.5 * correction

    def query_latent(self, x_BTD: Tensor) -> Tensor:
        """What queries are made of: the normed compressed query (eq. 12), or x itself."""
        return x_BTD if self.cfg.q_lora_rank is None else self.q_norm(self.wq_a(x_BTD))

    def queries(self, query_latent: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        flat = self.wq(query_latent) if self.cfg.q_lora_rank is None else self.wq_b(query_latent)
        q_BTHQ = flat.unflatten(-1, (self.cfg.n_heads, -1))  # eq. 13, 14, 16
        nope, rope = q_BTHQ.split([self.cfg.qk_nope_head_dim, self.cfg.qk_rope_head_dim], dim=-1)
        return torch.cat([nope, rotate(rope, *angles)], dim=-1)

    def latents(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the cache keeps: the normed latent (eq. 9) and the rotated shared key (eq. 15)."""
        latent, k_rope = self.wkv_a(x_BTD).split(
            [self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], dim=-1
        )
        return self.kv_norm(latent), rotate(k_rope[:, :, None], *angles)[:, :, 0]

    def expanded(
        self, q_BTHQ: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, core: Core
    ) -> Tensor:
        """Rebuild every head's keys and values, then attend (eq. 18)."""
        return core(q_BTHQ, *self.keys_values(latent_BSC, k_rope_BSR))

    def keys_values(self, latent_BSC: Tensor, k_rope_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys ``[B, S, H, Q]`` and values ``[B, S, H, V]`` (eq. 10, 11, 17)."""
        cfg = self.cfg
        kv = self.wkv_b(latent_BSC).unflatten(-1, (cfg.n_heads, -1))
        k_nope, v_BSHV = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=-1)
        k_rope = k_rope_BSR[:, :, None].expand(-1, -1, cfg.n_heads, -1)
        return torch.cat([k_nope, k_rope], dim=-1), v_BSHV

    def scores(self, x_BTD: Tensor, step: Step) -> Tensor:
        angles = step.angles(self.rope)
        k_BSHQ, _ = self.keys_values(*self.latents(x_BTD, angles))
        q_BTHQ = self.queries(self.query_latent(x_BTD), angles)
        return raw_scores(q_BTHQ, k_BSHQ, self.scale, step.mask(None))

    def position_keys(self, x_BTD: Tensor) -> tuple[Tensor, Rope]:
        return self.wkv_a(x_BTD)[:, :, None, self.cfg.kv_lora_rank :], self.rope

    def absorbed(
        self, q_BTHQ: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, core: Core
    ) -> Tensor:
        """Attend to the latents: one key head, whose first C channels are its value."""
        q_BTHF, k_BS1F = self.absorb(q_BTHQ, latent_BSC, k_rope_BSR)
        return self.lifted(core(q_BTHF, k_BS1F, latent_BSC[:, :, None]))

    def lifted(self, mix_BTHC: Tensor) -> Tensor:
        """Every head's values from its mix of latents: ``W_v`` applied afterwards."""
        return torch.einsum("bthc,hvc->bthv", mix_BTHC, self._up()[1])

    def absorb(
        self, q_BTHQ: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries ``[B, T, H, C + R]`` and the one key head ``[B, S, 1, C + R]`` they read.

        ``q_nope . (W_k latent) = (W_k^T q_nope) . latent``.
        """
        cfg = self.cfg
        nope, rope = q_BTHQ.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
        q_latent = torch.einsum("bthk,hkc->bthc", nope, self._up()[0])
        return (
            torch.cat([q_latent, rope], dim=-1),
            torch.cat([latent_BSC, k_rope_BSR], dim=-1)[:, :, None],
        )

    def _up(self) -> Sequence[Tensor]:
        """The up-projections of keys ``[H, K, C]`` and values ``[H, V, C]``."""
        up = self.wkv_b.weight.unflatten(0, (self.cfg.n_heads, -1))
        return up.split([self.cfg.qk_nope_head_dim, self.cfg.v_head_dim], dim=1)
