"""Parameters, FLOPs and cache bytes of a config: sums over what each part says of itself.

Conventions: a multiply-add is two FLOPs; norms, activations and the embedding look-up are not
counted. MTP modules and routing-only biases are not part of the model's parameters.
"""

from collections import Counter

from fathom.attention import AttentionConfig
from fathom.config import LayerGroup, ModelConfig


def num_params(cfg: ModelConfig) -> int:
    """Parameters of the main model; a tied head counts once."""
    tables = 1 if cfg.tie_embeddings else 2
    layers = sum(group.count * _layer_params(cfg, group) for group in cfg.groups)
    return tables * cfg.vocab_size * cfg.dim + layers + cfg.dim


def num_active_params(cfg: ModelConfig) -> int:
    """Parameters that one token reads: its experts, one row of the embedding, the whole head."""
    idle = sum(
        group.count * (group.ffn.num_params(cfg.dim) - group.ffn.num_active_params(cfg.dim))
        for group in cfg.groups
    )
    unread_rows = 0 if cfg.tie_embeddings else (cfg.vocab_size - 1) * cfg.dim
    return num_params(cfg) - idle - unread_rows


def num_mtp_params(cfg: ModelConfig) -> int:
    """Parameters of the MTP modules; embedding and head are the model's own."""
    if cfg.mtp is None:
        return 0
    module = 3 * cfg.dim + 2 * cfg.dim**2 + _layer_params(cfg, cfg.groups[-1])
    return cfg.mtp.n_mtp_modules * module


def _layer_params(cfg: ModelConfig, group: LayerGroup) -> int:
    norms = 2 * cfg.dim
    return norms + group.attention.num_params(cfg.dim) + group.ffn.num_params(cfg.dim)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """Forward FLOPs per token over ``seq_len`` keys each, as dense kernels spend them."""
    cores = sum(n * attention.core_flops(seq_len) for attention, n in attention_counts(cfg).items())
    return _flops_without_cores(cfg) + cores


def mean_causal_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """The same, but a token pays for the keys that it may see: the mean over 1 to ``seq_len``."""
    cores = sum(
        n * sum(map(attention.core_flops, range(1, seq_len + 1))) / seq_len
        for attention, n in attention_counts(cfg).items()
    )
    return _flops_without_cores(cfg) + cores


def _flops_without_cores(cfg: ModelConfig) -> int:
    layers = sum(
        group.count
        * (group.attention.projection_flops(cfg.dim) + group.ffn.flops_per_token(cfg.dim))
        for group in cfg.groups
    )
    return layers + 2 * cfg.vocab_size * cfg.dim


def attention_counts(cfg: ModelConfig) -> Counter[AttentionConfig]:
    """How many layers each attention of the model has."""
    counts: Counter[AttentionConfig] = Counter()
    for group in cfg.groups:
        counts[group.attention] += group.count
    return counts


def cache_bytes(cfg: ModelConfig, seq_len: int, cache_dtype: str = "bfloat16") -> int:
    """Bytes that decoding keeps for one sequence of ``seq_len`` tokens."""
    return sum(
        count * stream.num_bytes(seq_len, cache_dtype)
        for attention, count in attention_counts(cfg).items()
        for stream in attention.streams()
    )


def cache_bytes_per_token(cfg: ModelConfig, cache_dtype: str = "bfloat16") -> int:
    """Bytes that one more token adds, while every window has room; to the nearest byte."""
    added = sum(
        count * stream.num_bytes(stream.tokens_per_entry, cache_dtype) / stream.tokens_per_entry
        for attention, count in attention_counts(cfg).items()
        for stream in attention.streams()
    )
    return round(added)


def deepseek_training_flops(
    *, n_layers: int, dim: int, vocab_size: int, seq_len: int, ffn_equivalents: float = 1.0
) -> float:
    """Training FLOPs of one sequence as DeepSeek's papers print them, to compare with theirs.

    Idealised: attention has 4 D^2 weights, an FFN 8 D^2 (a MoE reads ``ffn_equivalents`` of them),
    no causal halving, three times the forward: ``6 (4 + 8 n) L D^2 + 12 L D T + 6 V D`` per token.
    """
    layer = 6 * (4 + 8 * ffn_equivalents) * dim**2 + 12 * dim * seq_len
    return (n_layers * layer + 6 * vocab_size * dim) * seq_len
