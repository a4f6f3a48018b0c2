"""DeepSeek Sparse Attention (DSA): DeepSeek-V3.2-Exp report, section 2.

MLA, of which a query reads only the ``index_topk`` tokens that a *lightning indexer* scores
highest. The indexer is a small attention of its own: a few heads, one key per token, ReLU instead
of a softmax, so that scoring all tokens costs little. All heads of MLA share the selection.

It learns in two stages from one loss, the KL between the indexer's softmax and the main attention's
weights: first (``index_warmup``) over all tokens while MLA still reads them all, then over the
selected ones. Its input is detached: the language-model loss never reaches the indexer, and the
indexer's loss nothing else.

Shapes: B batch, T new tokens, S all tokens so far, D model dim, H heads, C latent, K nope head dim,
R rope head dim, Q = K + R, F = C + R, V value head dim, J index heads, I index head dim, N selected
tokens, L query latent, G key heads (H expanded, 1 absorbed).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fathom.attention.base import Indexing, Selection
from fathom.attention.mla import MLA, MLAConfig
from fathom.layers.base import require, require_positive
from fathom.layers.cache import Stream
from fathom.layers.linear import Linear
from fathom.layers.step import Step
from fathom.ops.block_attention import block_attention
from fathom.ops.indexer import hadamard, index_loss, index_topk, quantise_rows
from fathom.ops.registry import wide
from fathom.ops.rope import rotate
from fathom.ops.token_attention import token_attention

INDEX_NORM_EPS = 1e-6  # of the norm of the index keys, a LayerNorm


@dataclass(frozen=True, kw_only=True)
class DSAConfig(MLAConfig):
    """MLA and its indexer.

    Args:
        index_n_heads: heads of the indexer.
        index_head_dim: their width; the first ``qk_rope_head_dim`` channels turn with position.
        index_topk: how many tokens a query reads.
        index_loss_coeff: weight of the indexer's loss; 0: the indexer is not trained.
        index_warmup: read every token and teach the indexer over all of them (the first stage).
        index_fp8: score with queries and keys in E4M3, one factor a row, after a Hadamard
            transform; half the cache and the time of scoring. The loss stays in full precision.
        index_shared: read what the nearest layer below with an indexer selected; no own indexer.
    """

    kind: Literal["dsa"] = "dsa"  # pyright: ignore
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    index_loss_coeff: float = 1.0
    index_warmup: bool = False
    index_fp8: bool = False
    index_shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "index_n_heads", "index_topk")
        require(
            self.index_head_dim >= self.qk_rope_head_dim,
            f"index_head_dim must be at least qk_rope_head_dim ({self.qk_rope_head_dim}), got "
            f"{self.index_head_dim}: the indexer turns as many channels as MLA",
        )
        power = self.index_head_dim & (self.index_head_dim - 1) == 0
        require(
            power or not self.index_fp8,
            f"index_fp8 needs an index_head_dim that is a power of two, got {self.index_head_dim}: "
            "the Hadamard transform has such widths",
        )
        require(
            self.index_loss_coeff >= 0,
            f"index_loss_coeff must be at least 0, got {self.index_loss_coeff}",
        )

    @classmethod
    def beside(
        cls, mla: MLAConfig, *, index_n_heads: int, index_head_dim: int, index_topk: int
    ) -> "DSAConfig":
        """``mla`` with an indexer."""
        return cls(
            **{
                field.name: getattr(mla, field.name)
                for field in fields(mla)
                if field.name != "kind"
            },
            index_n_heads=index_n_heads,
            index_head_dim=index_head_dim,
            index_topk=index_topk,
        )

    def build(self, dim: int) -> "DSA":
        return DSA(self, dim)

    def streams(self) -> Sequence[Stream]:
        """Those of MLA, and one index key per token, with its factor if it is in FP8."""
        if self.index_shared:
            return super().streams()
        if not self.index_fp8:
            return [*super().streams(), Stream("index_k", self.index_head_dim)]
        key = Stream("index_k", self.index_head_dim, dtype="float8_e4m3fn")
        return [*super().streams(), key, Stream("index_k_scale", 1, dtype="float32")]

    def num_params(self, dim: int) -> int:
        own = 0 if self.index_shared else self._index_matrix_params(dim) + 2 * self.index_head_dim
        return super().num_params(dim) + own

    def projection_flops(self, dim: int) -> int:
        own = 0 if self.index_shared else 2 * self._index_matrix_params(dim)
        return super().projection_flops(dim) + own

    def _index_matrix_params(self, dim: int) -> int:
        queries = (self.q_lora_rank or dim) * self.index_n_heads * self.index_head_dim
        return queries + dim * (self.index_head_dim + self.index_n_heads)

    def core_flops(self, seq_len: int) -> int:
        """Index scores over all tokens, the absorbed form over the selected; MLA up to top-k."""
        indexer = 2 * self.index_n_heads * self.index_head_dim * seq_len
        if self.index_shared:
            indexer = 0
        if self.reads_all(seq_len):
            return super().core_flops(seq_len) + (indexer if self.index_warmup else 0)
        latent_pair = 2 * self.kv_lora_rank + self.qk_rope_head_dim
        return indexer + 2 * self.n_heads * latent_pair * self.index_topk

    def reads_all(self, n_total: int) -> bool:
        """Whether every token is read: in warm-up, and while there are no more than top-k."""
        return self.index_warmup or n_total <= self.index_topk


class Indices(NamedTuple):
    """What the indexer makes of its input."""

    q_BTJI: Tensor
    k_BTI: Tensor
    weight_BTJ: Tensor


class Asked(NamedTuple):
    """Queries and keys of the main attention, in either form, and their log-sum-exp if known."""

    q_BTHF: Tensor
    k_BSGF: Tensor
    lse_BTH: Tensor | None


class Indexer(nn.Module):
    """Index queries, keys and head weights (equation 1). Its input is detached."""

    def __init__(self, cfg: DSAConfig, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.wq = Linear(cfg.q_lora_rank or dim, cfg.index_n_heads * cfg.index_head_dim)
        self.wk = Linear(dim, cfg.index_head_dim)
        self.k_norm = nn.LayerNorm(cfg.index_head_dim, eps=INDEX_NORM_EPS)
        self.w_head = Linear(dim, cfg.index_n_heads)

    def forward(
        self, x_BTD: Tensor, query_latent_BTL: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Indices:
        """``x`` is the layer's normed input, ``query_latent`` MLA's compressed query."""
        cfg, x_BTD = self.cfg, x_BTD.detach()
        q_BTJI = self.wq(query_latent_BTL.detach()).unflatten(-1, (cfg.index_n_heads, -1))
        k_BT1I = self.k_norm(self.wk(x_BTD))[:, :, None]
        scale = (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
        weight_BTJ = self.w_head(x_BTD).to(wide(x_BTD.dtype)) * scale
        return Indices(
            self.turned(q_BTJI, angles), self.turned(k_BT1I, angles)[:, :, 0], weight_BTJ
        )

    def turned(self, x_BTJI: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The *first* channels of a head turn; in MLA it is the last ones."""
        width = self.cfg.qk_rope_head_dim
        return torch.cat([rotate(x_BTJI[..., :width], *angles), x_BTJI[..., width:]], dim=-1)


class DSA(MLA):
    """See :class:`DSAConfig`."""

    cfg: DSAConfig

    def __init__(self, cfg: DSAConfig, dim: int) -> None:
        super().__init__(cfg, dim)
        self.indexer = None if cfg.index_shared else Indexer(cfg, dim)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        return self.attend(x_BTD, step)[0]

    def attend(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Indexing]:
        angles = step.angles(self.rope)
        query_latent = self.query_latent(x_BTD)
        q_BTHQ, new = self.queries(query_latent, angles), self.latents(x_BTD, angles)
        indices = None if self.indexer is None else self.indexer(x_BTD, query_latent, angles)
        index_k = [] if indices is None else self.cached_keys(indices.k_BTI)
        keys_BS, (latent_BSC, k_rope_BSR, *index_k) = step.append(*new, *index_k)
        selected_BTN = self.select(indices, index_k, latent_BSC.shape[1], step)
        if selected_BTN is None:
            mixed_BTHV, asked = self.read(q_BTHQ, latent_BSC, k_rope_BSR, keys_BS, step), None
        else:
            mixed_BTHV, asked = self.read_selected(
                q_BTHQ, latent_BSC, k_rope_BSR, selected_BTN, step
            )
        loss = None
        if indices is not None and self.teaches(indices, step):
            asked = asked or Asked(q_BTHQ, self.keys_values(latent_BSC, k_rope_BSR)[0], None)
            loss = self.index_loss(indices, asked, selected_BTN, step)
        return self.wo(mixed_BTHV.flatten(-2)), Indexing(loss, selected_BTN)

    def cached_keys(self, k_BTI: Tensor) -> list[Tensor]:
        """Index keys as they are kept: themselves, or in E4M3 with their factors."""
        if not self.cfg.index_fp8:
            return [k_BTI]
        small_BTI, scale_BT = quantise_rows(hadamard(k_BTI.detach()))
        return [small_BTI, scale_BT[..., None]]

    def select(
        self, indices: Indices | None, index_k: Sequence[Tensor], n_total: int, step: Step
    ) -> Tensor | None:
        """The tokens that each query reads, int32 ``[B, T, N]``; None: all that it may see.

        ``index_k`` is what :meth:`cached_keys` gave for all tokens so far.
        """
        if self.cfg.reads_all(n_total):
            return None
        if indices is None:
            return step.selected_BTN
        q_BTJI, _, weight_BTJ = indices
        k_scale_BS = None
        if self.cfg.index_fp8:
            q_BTJI, q_scale_BTJ = quantise_rows(hadamard(q_BTJI.detach()))
            weight_BTJ, k_scale_BS = weight_BTJ * q_scale_BTJ, index_k[1][..., 0]
        return index_topk(
            q_BTJI,
            index_k[0],
            weight_BTJ,
            *self.interval(step),
            topk=self.cfg.index_topk,
            k_scale_BS=k_scale_BS,
        )

    def interval(self, step: Step) -> tuple[Tensor, Tensor]:
        """What a query may see: its own place among the keys, and the first of its document."""
        places_BT = step.places("latent")
        return places_BT, places_BT - step.positions_BT

    @torch.no_grad()
    def selection(self, x_BTD: Tensor, step: Step) -> Selection | None:
        selected_BTN = self.attend(x_BTD, step)[1].selected_BTN
        return None if selected_BTN is None else Selection(selected_BTN[:, :, None], 1)

    def read_selected(
        self,
        q_BTHQ: Tensor,
        latent_BSC: Tensor,
        k_rope_BSR: Tensor,
        selected_BTN: Tensor,
        step: Step,
    ) -> tuple[Tensor, Asked]:
        """Attend to the selected tokens: absorbed, for a latent is gathered once for all heads."""
        if self.cfg.absorb != "never":
            q_BTHF, k_BS1F = self.absorb(q_BTHQ, latent_BSC, k_rope_BSR)
            mix_BTHC, lse_BTH = token_attention(
                q_BTHF,
                k_BS1F[:, :, 0],
                selected_BTN,
                value_dim=self.cfg.kv_lora_rank,
                scale=self.scale,
            )
            return self.lifted(mix_BTHC), Asked(q_BTHF, k_BS1F, lse_BTH)
        k_BSHQ, v_BSHV = self.keys_values(latent_BSC, k_rope_BSR)
        mixed_BTHV = block_attention(
            q_BTHQ,
            k_BSHQ,
            v_BSHV,
            selected_BTN[:, :, None],
            step.places("latent"),
            block_size=1,
            scale=self.scale,
        )
        return mixed_BTHV, Asked(q_BTHQ, k_BSHQ, None)

    def teaches(self, indices: Indices, step: Step) -> bool:
        """Whether the indexer is trained in this step."""
        training = torch.is_grad_enabled() and indices.weight_BTJ.requires_grad
        return training and step.cache is None and self.cfg.index_loss_coeff > 0

    def index_loss(
        self, indices: Indices, asked: Asked, selected_BTN: Tensor | None, step: Step
    ) -> Tensor:
        """The indexer's weighted loss: how far its softmax is from the main attention's weights."""
        loss = index_loss(
            *indices,
            asked.q_BTHF,
            asked.k_BSGF,
            *self.interval(step),
            scale=self.scale,
            selected_BTN=selected_BTN,
            main_lse_BTH=asked.lse_BTH,
        )
        return self.cfg.index_loss_coeff * loss
