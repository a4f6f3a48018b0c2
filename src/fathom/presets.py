"""Named models: tiny ones for trials, published shapes, and a dial from one number to a config.

Published shapes are those of the released ``config.json`` files. ``sized`` derives every value from
a parameter count by the rules in its docstring; ``llama-35m`` or ``deepseek-1.5b`` turn the dial.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from fathom.attention import (
    AttentionConfig,
    DSAConfig,
    MHAConfig,
    MLAConfig,
    MoBAConfig,
    NSAConfig,
)
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.ffn import DenseConfig, FFNConfig, MoEConfig
from fathom.ffn.balance import AuxLossFree, SeqAuxLoss
from fathom.layers.position import RopeConfig
from fathom.layers.rope import AnyScaling, Llama3Scaling, YarnScaling
from fathom.settings import ConfigError
from fathom.sizing.count import num_params

Family = Literal["llama", "deepseek"]


def preset(name: str) -> ModelConfig:
    """The model of that name: one of ``PRESETS``, or ``llama-<size>`` and ``deepseek-<size>``.

    Raises:
        ConfigError: no such name; the sentence says the nearest.
    """
    if name in _TABLE:
        return _TABLE[name]()
    if dial := re.fullmatch(r"(llama|deepseek)-(\d+(?:\.\d+)?)(m|b)", name):
        family, number, unit = dial.groups()
        scale = {"m": 1e6, "b": 1e9}[unit]
        return sized("llama" if family == "llama" else "deepseek", round(float(number) * scale))
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"the presets are {', '.join(PRESETS)}"
    raise ConfigError(f"no preset is called {name!r}: {hint}")


def sized(family: Family, params: int, *, vocab_size: int | None = None) -> ModelConfig:
    """A model of about ``params`` parameters in all, for training from scratch.

    Every value follows from the number:

    * vocabulary: 1024 below 4 M, 4096 below 200 M, 32768 above, unless given;
    * context: 512 below 4 M, 1024 below 200 M, 4096 above;
    * width and depth: ``dim`` a multiple of 64, 48 to 96 times the layers; of the shapes within 5 %
      of ``params`` the one nearest to 64 times;
    * heads of 32 channels below ``dim`` 512, else 64; as many as fill ``dim``, in threes or fours;
    * FFN: ``inter_dim`` 8/3 of ``dim``, rounded up to a multiple of 128.

    ``llama``: GQA, 4 (else 3) query heads to a key-value head. ``deepseek``: MLA with a latent of 4
    heads and a position key of half a head; 64 experts of an eighth of ``inter_dim``, of which a
    token reads 7 and a shared one, together as wide as the dense FFN; the first layer dense;
    loss-free balance; one MTP module, not counted in ``params``.

    Raises:
        ConfigError: an unknown family, or a number that no shape comes near.
    """
    if family not in get_args(Family):
        raise ConfigError(f"family must be llama or deepseek, got {family!r}")
    small, middle = params < 4e6, params < 200e6
    vocab = vocab_size or (1024 if small else 4096 if middle else 32768)
    context = 512 if small else 1024 if middle else 4096
    build = partial(_sized_llama if family == "llama" else _sized_deepseek, vocab, context)

    def unlikeness(cfg: ModelConfig) -> tuple[float, float]:
        miss = abs(math.log(num_params(cfg) / params)) if params > 0 else math.inf
        return max(miss, 0.05), abs(math.log(cfg.dim / cfg.n_layers / 64))

    best = min(_shapes(build, params), key=unlikeness)
    if unlikeness(best)[0] > 0.5:
        raise ConfigError(
            f"no {family} shape has about {params:,} parameters with a vocabulary of {vocab:,}: "
            f"the nearest has {num_params(best):,}"
        )
    return best


def _shapes(build: Callable[[int, int], ModelConfig], params: int) -> Iterator[ModelConfig]:
    """For each width the depth that comes nearest, within 48 to 96 channels per layer."""
    widths = [
        dim for dim in range(64, 16385, 64) if _heads(dim)[1] % 3 == 0 or _heads(dim)[1] % 4 == 0
    ]
    for dim in widths:
        two, three = num_params(build(dim, 2)), num_params(build(dim, 3))
        wanted = 2 + round((params - two) / (three - two))
        low, high = max(2, math.ceil(dim / 96)), max(2, dim // 48)
        yield build(dim, min(max(wanted, low), high))


def _sized_llama(vocab_size: int, max_seq_len: int, dim: int, n_layers: int) -> ModelConfig:
    head_dim, n_heads = _heads(dim)
    attention = _mha(n_heads, n_heads // (3 if n_heads % 4 else 4), head_dim)
    ffn = DenseConfig(inter_dim=_inter_dim(dim))
    return _from_scratch(vocab_size, max_seq_len, dim, [(n_layers, attention, ffn)])


def _sized_deepseek(vocab_size: int, max_seq_len: int, dim: int, n_layers: int) -> ModelConfig:
    head_dim, n_heads = _heads(dim)
    attention = MLAConfig(
        n_heads=n_heads,
        kv_lora_rank=4 * head_dim,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
        position=RopeConfig(),
    )
    inter_dim = _inter_dim(dim)
    experts = _v3_moe(64, top_k=7, inter_dim=inter_dim // 8, route_scale=7**0.5)
    layers = [(1, attention, DenseConfig(inter_dim=inter_dim)), (n_layers - 1, attention, experts)]
    cfg = _from_scratch(vocab_size, max_seq_len, dim, layers)
    return replace(cfg, mtp=MTPConfig())


def _heads(dim: int) -> tuple[int, int]:
    """Width and number of heads."""
    head_dim = 32 if dim < 512 else 64
    return head_dim, dim // head_dim


def _inter_dim(dim: int) -> int:
    return math.ceil(dim * 8 / 3 / 128) * 128


def _from_scratch(
    vocab_size: int,
    max_seq_len: int,
    dim: int,
    layers: Sequence[tuple[int, AttentionConfig, FFNConfig]],
) -> ModelConfig:
    groups = tuple(LayerGroup(count=n, attention=a, ffn=f) for n, a, f in layers)
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        groups=groups,
        max_seq_len=max_seq_len,
        depth_scaled_init=True,
    )


def _mha(
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    theta: float = 10000.0,
    scaling: AnyScaling | None = None,
) -> MHAConfig:
    position = RopeConfig(theta=theta, scaling=scaling)
    return MHAConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, position=position)


def _v3_moe(
    n_routed_experts: int,
    *,
    top_k: int,
    inter_dim: int,
    route_scale: float,
    n_expert_groups: int = 1,
    n_limited_groups: int = 1,
    seq_aux_loss_coeff: float = 1e-4,
) -> MoEConfig:
    """DeepSeek-V3's routing: normalised sigmoid scores, one shared expert, loss-free balance."""
    return MoEConfig(
        n_routed_experts=n_routed_experts,
        n_shared_experts=1,
        top_k=top_k,
        inter_dim=inter_dim,
        score_func="sigmoid",
        n_expert_groups=n_expert_groups,
        n_limited_groups=n_limited_groups,
        group_score="top2",
        norm_topk_prob=True,
        route_scale=route_scale,
        balance=(AuxLossFree(), SeqAuxLoss(seq_aux_loss_coeff=seq_aux_loss_coeff)),
    )


def _tiny(
    attention: AttentionConfig | None = None,
    ffn: FFNConfig | None = None,
    *,
    first_dense: bool = False,
    mtp: MTPConfig | None = None,
) -> ModelConfig:
    """Four layers of 128 channels: trained in seconds on a CPU."""
    attention, dense = attention or _mha(4, 4, 32), DenseConfig(inter_dim=384)
    above = (3 if first_dense else 4, attention, ffn or dense)
    layers = [(1, attention, dense), above] if first_dense else [above]
    return replace(_from_scratch(1024, 512, 128, layers), mtp=mtp)


def _tiny_mla() -> MLAConfig:
    return MLAConfig(
        n_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        position=RopeConfig(),
    )


def _tiny_moba() -> MoBAConfig:
    """A query reads at most 96 of 512 tokens."""
    return MoBAConfig(
        n_heads=4, n_kv_heads=4, head_dim=32, position=RopeConfig(), block_size=32, topk_blocks=3
    )


def _tiny_nsa() -> NSAConfig:
    """A query reads at most 63 compressed keys, 128 selected tokens and a window of 64."""
    return NSAConfig(
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        position=RopeConfig(),
        cmp_block_size=16,
        cmp_stride=8,
        block_size=32,
        topk_blocks=4,
        window_size=64,
    )


def _tiny_moe() -> MoEConfig:
    """A token reads 5 routed experts and the shared one: 6 x 64 channels, as the dense 384."""
    return _v3_moe(16, top_k=5, inter_dim=64, route_scale=5**0.5)


def _llama(
    vocab_size: int,
    dim: int,
    inter_dim: int,
    n_layers: int,
    attention: MHAConfig,
    *,
    max_seq_len: int,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
) -> ModelConfig:
    ffn = DenseConfig(inter_dim=inter_dim)
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        groups=(LayerGroup(count=n_layers, attention=attention, ffn=ffn),),
        max_seq_len=max_seq_len,
        tie_embeddings=tie_embeddings,
        init_std=init_std,
    )


def _smollm2_135m() -> ModelConfig:
    attention = _mha(9, 3, 64, theta=100000.0)
    return _llama(
        49152, 576, 1536, 30, attention, max_seq_len=8192, tie_embeddings=True, init_std=1 / 24
    )


def _llama_3(dim: int, n_layers: int, head_dim: int, factor: float, *, tied: bool) -> ModelConfig:
    """Llama 3.1 and 3.2: 32 heads, 8 key-value heads, contexts stretched from 8192."""
    scaling = Llama3Scaling(factor=factor, original_seq_len=8192)
    attention = _mha(32, 8, head_dim, theta=500000.0, scaling=scaling)
    inter_dim = {4096: 14336, 2048: 8192}[dim]
    return _llama(
        128256, dim, inter_dim, n_layers, attention, max_seq_len=131072, tie_embeddings=tied
    )


def _deepseek(
    vocab_size: int,
    dim: int,
    n_dense: int,
    dense_inter_dim: int,
    n_moe: int,
    attention: AttentionConfig,
    experts: MoEConfig,
    *,
    max_seq_len: int,
    norm_eps: float = 1e-6,
    mtp: MTPConfig | None = None,
) -> ModelConfig:
    dense = DenseConfig(inter_dim=dense_inter_dim)
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        groups=(
            LayerGroup(count=n_dense, attention=attention, ffn=dense),
            LayerGroup(count=n_moe, attention=attention, ffn=experts),
        ),
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        mtp=mtp,
    )


def _mla(
    n_heads: int,
    q_lora_rank: int | None,
    theta: float = 10000.0,
    scaling: YarnScaling | None = None,
) -> MLAConfig:
    """The ranks and head widths that every released MLA of the lineage has."""
    return MLAConfig(
        n_heads=n_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        position=RopeConfig(theta=theta, scaling=scaling),
    )


def _yarn(mscale: float, factor: float = 40.0, beta_fast: float = 32.0) -> YarnScaling:
    return YarnScaling(
        factor=factor,
        original_seq_len=4096,
        beta_fast=beta_fast,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


def _softmax_moe(n_routed_experts: int = 64, inter_dim: int = 1408) -> MoEConfig:
    """Routing of DeepSeek-MoE and V2-Lite: plain softmax scores, two shared experts."""
    return MoEConfig(
        n_routed_experts=n_routed_experts,
        n_shared_experts=2,
        top_k=6,
        inter_dim=inter_dim,
        balance=(SeqAuxLoss(seq_aux_loss_coeff=1e-3),),
    )


def _deepseek_moe_16b() -> ModelConfig:
    attention = _mha(16, 16, 128)
    return _deepseek(102400, 2048, 1, 10944, 27, attention, _softmax_moe(), max_seq_len=4096)


def _deepseek_v2_lite() -> ModelConfig:
    attention = _mla(16, None, scaling=_yarn(0.707))
    return _deepseek(102400, 2048, 1, 10944, 26, attention, _softmax_moe(), max_seq_len=163840)


def _deepseek_v2() -> ModelConfig:
    attention = _mla(128, 1536, scaling=_yarn(0.707))
    experts = replace(
        _softmax_moe(160, 1536), n_expert_groups=8, n_limited_groups=3, route_scale=16.0
    )
    return _deepseek(102400, 5120, 1, 12288, 59, attention, experts, max_seq_len=163840)


def _deepseek_v3(attention: AttentionConfig | None = None) -> ModelConfig:
    attention = attention or _mla(128, 1536, scaling=_yarn(1.0))
    experts = _v3_moe(
        256, top_k=8, inter_dim=2048, route_scale=2.5, n_expert_groups=8, n_limited_groups=4
    )
    mtp = MTPConfig(late_mtp_loss_coeff=0.1, late_from=10 / 14.8)  # T tokens of training
    return _deepseek(129280, 7168, 3, 18432, 58, attention, experts, max_seq_len=163840, mtp=mtp)


def _deepseek_v32() -> ModelConfig:
    mla = _mla(128, 1536, scaling=_yarn(1.0))
    return _deepseek_v3(
        DSAConfig.beside(mla, index_n_heads=64, index_head_dim=128, index_topk=2048)
    )


def _moonlight_16b_a3b() -> ModelConfig:
    attention = _mla(16, None, theta=50000.0)
    experts = replace(
        _v3_moe(64, top_k=6, inter_dim=1408, route_scale=2.446, seq_aux_loss_coeff=1e-3),
        n_shared_experts=2,
    )
    return _deepseek(
        163840, 2048, 1, 11264, 26, attention, experts, max_seq_len=8192, norm_eps=1e-5
    )


def _kimi_k2() -> ModelConfig:
    attention = _mla(64, 1536, theta=50000.0, scaling=_yarn(1.0, factor=32.0, beta_fast=1.0))
    experts = _v3_moe(384, top_k=8, inter_dim=2048, route_scale=2.827, seq_aux_loss_coeff=1e-3)
    return _deepseek(163840, 7168, 1, 18432, 60, attention, experts, max_seq_len=131072)


def _moe_1_25b() -> ModelConfig:
    """A fine-grained MoE that trains on one GPU: the shape our benchmarks use."""
    attention = MLAConfig(
        n_heads=16,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        position=RopeConfig(),
    )
    experts = _v3_moe(64, top_k=6, inter_dim=512, route_scale=6**0.5)
    return _deepseek(32768, 1024, 1, 4096, 11, attention, experts, max_seq_len=2048)


_TABLE: dict[str, Callable[[], ModelConfig]] = {
    "tiny-llama": _tiny,
    "tiny-gqa": lambda: _tiny(_mha(4, 2, 32)),
    "tiny-mla": lambda: _tiny(_tiny_mla()),
    "tiny-moe": lambda: _tiny(ffn=_tiny_moe()),
    "tiny-moba": lambda: _tiny(_tiny_moba()),
    "tiny-nsa": lambda: _tiny(_tiny_nsa()),
    "tiny-dsa": lambda: _tiny(
        DSAConfig.beside(_tiny_mla(), index_n_heads=8, index_head_dim=32, index_topk=64)
    ),
    "tiny-deepseek": lambda: _tiny(_tiny_mla(), _tiny_moe(), first_dense=True, mtp=MTPConfig()),
    "moe-1.25b": _moe_1_25b,
    "smollm2-135m": _smollm2_135m,
    "llama-2-7b": lambda: _llama(32000, 4096, 11008, 32, _mha(32, 32, 128), max_seq_len=4096),
    "llama-3.2-1b": lambda: _llama_3(2048, 16, 64, 32.0, tied=True),
    "llama-3-8b": lambda: _llama_3(4096, 32, 128, 8.0, tied=False),
    "deepseek-moe-16b": _deepseek_moe_16b,
    "deepseek-v2-lite": _deepseek_v2_lite,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
    "deepseek-v3.2": _deepseek_v32,
    "moonlight-16b-a3b": _moonlight_16b_a3b,
    "kimi-k2": _kimi_k2,
}

_ON_THE_DIAL = ("llama-5m", "llama-20m", "llama-100m", "deepseek-20m", "deepseek-100m")

PRESETS: tuple[str, ...] = (*_TABLE, *_ON_THE_DIAL)
