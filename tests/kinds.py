"""Every attention and position that the tests run through, tiny."""

from fathom.attention import AttentionConfig, DSAConfig, MHAConfig, MLAConfig, MoBAConfig, NSAConfig
from fathom.layers.position import (
    AlibiConfig,
    AnyPosition,
    DecoupledRopeConfig,
    NoPositionConfig,
    RopeConfig,
)
from fathom.layers.rope import DynamicScaling, Llama3Scaling, YarnScaling

DIM = 24
ROPE = RopeConfig(theta=100.0)
YARN = RopeConfig(
    theta=100.0,
    scaling=YarnScaling(factor=4.0, original_seq_len=8, mscale=0.7, mscale_all_dim=0.7),
)


def mha(position: AnyPosition = ROPE, n_kv_heads: int = 2, **changes) -> MHAConfig:
    return MHAConfig(n_heads=4, n_kv_heads=n_kv_heads, head_dim=6, position=position, **changes)


MLA_SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}


def mla(position: RopeConfig = ROPE, q_lora_rank: int | None = None, **changes) -> MLAConfig:
    return MLAConfig(n_heads=4, q_lora_rank=q_lora_rank, position=position, **MLA_SIZES, **changes)


def dsa(position: RopeConfig = ROPE, q_lora_rank: int | None = 20, **changes) -> DSAConfig:
    """Sixteen index heads: with few, many scores are exactly 0 and tie."""
    sizes = {**MLA_SIZES, "index_n_heads": 16, "index_head_dim": 10, "index_topk": 4}
    fields = {"q_lora_rank": q_lora_rank, "position": position, **sizes, **changes}
    return DSAConfig(n_heads=4, **fields)


def moba(position: RopeConfig | NoPositionConfig = ROPE, **changes) -> MoBAConfig:
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "block_size": 2, "topk_blocks": 3}
    return MoBAConfig(position=position, **sizes | changes)


def nsa(position: RopeConfig | NoPositionConfig = ROPE, **changes) -> NSAConfig:
    heads = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "v_head_dim": 5}
    blocks = {"cmp_block_size": 2, "cmp_stride": 1, "block_size": 2, "topk_blocks": 4}
    return NSAConfig(position=position, **heads | blocks | {"window_size": 3} | changes)


KINDS: dict[str, AttentionConfig] = {
    "mha": mha(n_kv_heads=4),
    "gqa": mha(),
    "mqa": mha(n_kv_heads=1),
    "shared-query": mha(n_kv_heads=4, shared_query=True),
    "biases": mha(qkv_bias=True, out_bias=True),
    "no-position": mha(NoPositionConfig()),
    "alibi": mha(AlibiConfig()),
    "alibi-window": mha(AlibiConfig(), window_size=3),
    "decoupled": mha(DecoupledRopeConfig(theta=100.0, rope_head_dim=4)),
    "decoupled-shared-query": mha(
        DecoupledRopeConfig(rope_head_dim=4), n_kv_heads=4, shared_query=True
    ),
    "llama3": mha(RopeConfig(scaling=Llama3Scaling(factor=8.0, original_seq_len=8))),
    "yarn": mha(YARN),
    "window": mha(window_size=3),
    "window-1": mha(window_size=1),
    "mla": mla(),
    "mla-compressed": mla(q_lora_rank=20),
    "mla-absorbed": mla(absorb="always"),
    "mla-expanded": mla(absorb="never"),
    "mla-bias": mla(q_lora_rank=20, bias=True),
    "mla-yarn": mla(YARN),
    "moba": moba(),
    "moba-mha-no-position": moba(NoPositionConfig(), n_kv_heads=4, block_size=3, topk_blocks=2),
    "moba-current-block": moba(block_size=4, topk_blocks=1),
    "moba-key-conv": moba(key_conv_size=3),
    "moba-full": moba(full_from=0.9),
    "dsa": dsa(),
    "dsa-expanded": dsa(absorb="never"),
    "dsa-plain-query": dsa(q_lora_rank=None),
    "dsa-short": dsa(index_topk=64),
    "dsa-warmup": dsa(index_warmup=True),
    "dsa-yarn": dsa(YARN),
    "dsa-fp8": dsa(index_head_dim=16, index_fp8=True),
    "nsa": nsa(),
    "nsa-shared-mean-rotated": nsa(
        share_kv=True, compression="mean", compress_rotated=True, gate_per="token"
    ),
    "nsa-weighted-no-position": nsa(
        NoPositionConfig(), compression="weighted", cmp_block_size=4, cmp_stride=2, window_size=4
    ),
    "nsa-no-compressed-entry-yet": nsa(cmp_block_size=4, cmp_stride=4, block_size=4, topk_blocks=3),
}
# theta depends on the length in use, so a shorter call is another function: not in KINDS
DYNAMIC = mha(RopeConfig(scaling=DynamicScaling(factor=2.0, original_seq_len=4)))
