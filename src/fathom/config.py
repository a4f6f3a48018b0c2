"""The model's config: layer groups, MTP, norms, and the layout over processes.

A model is a list of layer groups, so hybrids are lists, not flags. The classes of the parts stand
beside their modules (``attention/``, ``ffn/``); ``fathom.settings`` reads them all from TOML.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from fathom.attention import ATTENTION, AttentionConfig, DSAConfig
from fathom.ffn import FFNS, FFNConfig, MoEConfig
from fathom.layers.base import Config, OneOf, require, require_positive


@dataclass(frozen=True, kw_only=True)
class LayerGroup(Config):
    """``count`` equal layers."""

    count: int
    attention: Annotated[AttentionConfig, OneOf(ATTENTION)]
    ffn: Annotated[FFNConfig, OneOf(FFNS)]

    def __post_init__(self) -> None:
        require_positive(self, "count")


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Config):
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2).

    Each module is one more layer, shaped as the last group; embedding and head are the model's own.

    Args:
        n_mtp_modules: how many tokens beyond the next one are predicted.
        mtp_loss_coeff: weight of the mean MTP loss.
        late_mtp_loss_coeff: its weight from ``late_from`` of training on; None: no change.
        late_from: a share of training, 0 to 1 (V3: 10 of 14.8 T tokens).
        post_norm_hidden: feed the hidden state after the final norm (as Hugging Face does) or
            before it.
    """

    n_mtp_modules: int = 1
    mtp_loss_coeff: float = 0.3
    late_mtp_loss_coeff: float | None = None
    late_from: float = 0.67
    post_norm_hidden: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "n_mtp_modules")
        require(
            self.mtp_loss_coeff >= 0,
            f"mtp_loss_coeff must be at least 0, got {self.mtp_loss_coeff}",
        )
        require(0 <= self.late_from <= 1, f"late_from is a share from 0 to 1, got {self.late_from}")

    def loss_coeff(self, progress: float) -> float:
        """The weight at ``progress`` (0 to 1) of training."""
        late = self.late_mtp_loss_coeff
        return self.mtp_loss_coeff if late is None or progress < self.late_from else late


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A transformer decoder.

    Args:
        vocab_size: tokens.
        dim: residual width D.
        groups: the layers, bottom to top.
        max_seq_len: the context it is meant for; the calculators' default length.
        norm_eps: of every RMSNorm but MLA's two inner ones.
        tie_embeddings: the head is the embedding.
        init_std: standard deviation of the initial weights.
        depth_scaled_init: divide the std of each block's two output projections by sqrt(2 layers).
        mtp: multi-token prediction, or None.
    """

    vocab_size: int
    dim: int
    groups: tuple[LayerGroup, ...]
    max_seq_len: int = 4096
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    depth_scaled_init: bool = False
    mtp: MTPConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "dim", "max_seq_len")
        require(len(self.groups) >= 1, "groups must hold at least one layer group, got none")
        bounds = {"n_layers": 1000, "dim": 65536, "vocab_size": 2**20, "max_seq_len": 2**24}
        for field, bound in bounds.items():
            value = getattr(self, field)
            require(value <= bound, f"{field} must be at most {bound}, got {value}")
        self._check_shared_indices()

    def _check_shared_indices(self) -> None:
        """A layer that shares an indexer's selection stands above one that selects as many."""
        below: DSAConfig | None = None
        for index, group in enumerate(self.groups):
            attention = group.attention
            if not isinstance(attention, DSAConfig):
                continue
            key = f"groups.{index}.attention"
            if attention.index_shared:
                require(below is not None, f"{key}.index_shared needs a dsa layer below it")
                assert below is not None
                same = (attention.index_topk, attention.index_warmup) == (
                    below.index_topk,
                    below.index_warmup,
                )
                require(same, f"{key}.index_topk and index_warmup must be those that it shares")
                require(
                    self.mtp is None or index + 1 < len(self.groups),
                    f"{key}.index_shared cannot be in the last group with mtp: its module is one "
                    "more such layer, with no indexer below it",
                )
            below = attention

    @property
    def n_layers(self) -> int:
        return sum(group.count for group in self.groups)

    def layers(self) -> list[LayerGroup]:
        """The group of each layer, bottom to top."""
        return [group for group in self.groups for _ in range(group.count)]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """The layout over ``dp * ep`` processes, all of which split the batch (``parallel/mesh.py``).

    Args:
        dp: how many sets of ``ep`` ranks there are, each with all experts.
        ep: over how many ranks the experts of each MoE are spread, equally many on each.
        shard: how many neighbouring ranks share one copy of everything else, its gradients and
            optimizer state (FSDP2); from ``2 ep`` on, copies of the experts too. 1: replicated;
            ``dp * ep``: one copy in all; between: hybrid.
        dispatch: how tokens travel to their experts: as they are, or as FP8 with a scale per 128
            channels. Answers and gradients always travel as they are.
        timeout: seconds that ranks wait for each other in one exchange.
        tp, cp, pp: the places of tensor, context and pipeline parallelism, which do not exist yet.
    """

    dp: int = 1
    ep: int = 1
    shard: int = 1
    dispatch: Literal["same", "fp8"] = "same"
    timeout: float = 600.0
    tp: int = 1
    cp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "dp", "ep", "shard")
        for axis in ("tp", "cp", "pp"):
            value = getattr(self, axis)
            require(value == 1, f"{axis} must be 1, got {value}: only dp and ep exist so far")
        require(
            self.world % self.shard == 0
            and max(self.shard, self.ep) % min(self.shard, self.ep) == 0,
            f"shard must divide dp * ep ({self.world}), and be a multiple or a divisor of "
            f"ep ({self.ep}), got {self.shard}: ranks that share a copy are neighbours",
        )
        require(
            0 < self.timeout < math.inf,
            f"timeout must be above 0 seconds and finite, got {self.timeout}",
        )

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.dp * self.ep

    @property
    def expert_shard(self) -> int:
        """How many ranks of ``dp`` share one copy of the experts that one rank of ``ep`` holds."""
        return max(self.shard // self.ep, 1)

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a model whose experts cannot be spread over ``ep`` ranks."""
        moes = [group.ffn for group in model.groups if isinstance(group.ffn, MoEConfig)]
        require(
            self.ep == 1 or bool(moes),
            f"parallel.ep is {self.ep} and the model has no MoE layer: use parallel.dp",
        )
        for moe in moes:
            require(
                moe.n_routed_experts % self.ep == 0,
                f"parallel.ep ({self.ep}) must divide n_routed_experts ({moe.n_routed_experts}): "
                "every rank holds equally many",
            )
