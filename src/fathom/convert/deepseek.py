"""DeepSeek checkpoints (V1 to V3.2, R1 and their relatives) under Hugging Face names, as rules.

V1 has Llama's attention; V2 and V3 have MLA, whose RoPE rows turn adjacent pairs and are reordered;
V3.2 has an indexer beside it, whose rows turn halves, as ours do.
Experts lie one by one on disk and stacked here. The layers past the last are MTP modules, which
store the embedding and the head a second time.
"""

from fathom.attention import DSAConfig, MHAConfig, MLAConfig
from fathom.config import LayerGroup, ModelConfig
from fathom.convert.llama import attention_rules, frame_rules, kinds, mlp_rules, norm_rules
from fathom.convert.rules import Copy, Deinterleave, Rename, Rule, StackExperts
from fathom.ffn import DenseConfig, MoEConfig


def deepseek_rules(cfg: ModelConfig, *, interleaved: bool = True) -> list[Rule]:
    """The rules of a whole DeepSeek-like model.

    Args:
        cfg: the model.
        interleaved: their RoPE turns adjacent pairs (every release of V2 and V3).
    """
    rules = frame_rules(cfg)
    for index, group in enumerate(cfg.layers()):
        rules += layer_rules(f"blocks.{index}.", f"model.layers.{index}.", group, interleaved)
    depth = 0 if cfg.mtp is None else cfg.mtp.n_mtp_modules
    for k in range(depth):
        theirs = f"model.layers.{cfg.n_layers + k}."
        rules += mtp_rules(f"mtp.{k}.", theirs)
        rules += layer_rules(f"mtp.{k}.block.", theirs, cfg.groups[-1], interleaved)
        rules.append(Copy("embed.weight", theirs + "embed_tokens.weight", written=True))
        head = "embed.weight" if cfg.tie_embeddings else "head.weight"
        rules.append(Copy(head, theirs + "shared_head.head.weight", written=True))
    return rules


def layer_rules(ours: str, theirs: str, group: LayerGroup, interleaved: bool) -> list[Rule]:
    """One layer: two norms, attention, dense or MoE FFN."""
    rules = norm_rules(ours, theirs)
    if isinstance(group.attention, MLAConfig):
        rules += mla_rules(group.attention, ours, theirs, interleaved)
        if isinstance(group.attention, DSAConfig):
            rules += indexer_rules(ours + "attention.indexer.", theirs + "self_attn.indexer.")
    else:
        assert isinstance(group.attention, MHAConfig)
        rules += attention_rules(group.attention, ours, theirs)
    if isinstance(group.ffn, MoEConfig):
        return rules + moe_rules(group.ffn, ours + "ffn.", theirs + "mlp.")
    assert isinstance(group.ffn, DenseConfig)
    return rules + mlp_rules(ours + "ffn.", theirs + "mlp.", bias=group.ffn.bias)


def mla_rules(cfg: MLAConfig, ours: str, theirs: str, interleaved: bool) -> list[Rule]:
    """MLA. Biases, where there are any, sit on the two down-projections and the output."""
    ours, theirs = ours + "attention.", theirs + "self_attn."
    latent_width = cfg.kv_lora_rank + cfg.qk_rope_head_dim

    def turned(ours: str, theirs: str, head_width: int) -> Rule:
        if interleaved:
            return Deinterleave(ours, theirs, head_width, cfg.qk_rope_head_dim)
        return Rename(ours, theirs)

    if cfg.q_lora_rank is None:
        queries = [turned(ours + "wq.weight", theirs + "q_proj.weight", cfg.qk_head_dim)]
    else:
        queries = [
            *(Rename(f"{ours}wq_a.{k}", f"{theirs}q_a_proj.{k}") for k in kinds(cfg.bias)),
            Rename(ours + "q_norm.weight", theirs + "q_a_layernorm.weight"),
            turned(ours + "wq_b.weight", theirs + "q_b_proj.weight", cfg.qk_head_dim),
        ]
    return [
        *queries,
        *(
            turned(f"{ours}wkv_a.{k}", f"{theirs}kv_a_proj_with_mqa.{k}", latent_width)
            for k in kinds(cfg.bias)
        ),
        Rename(ours + "kv_norm.weight", theirs + "kv_a_layernorm.weight"),
        Rename(ours + "wkv_b.weight", theirs + "kv_b_proj.weight"),
        *(Rename(f"{ours}wo.{k}", f"{theirs}o_proj.{k}") for k in kinds(cfg.bias)),
    ]


def indexer_rules(ours: str, theirs: str) -> list[Rule]:
    """The lightning indexer."""
    names = {"wq": "wq_b", "wk": "wk", "k_norm": "k_norm", "w_head": "weights_proj"}
    return [
        *(Rename(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in names.items()),
        Rename(ours + "k_norm.bias", theirs + "k_norm.bias"),
    ]


def moe_rules(cfg: MoEConfig, ours: str, theirs: str) -> list[Rule]:
    """Router, its routing-only bias, stacked experts (gate rows first), shared experts."""
    experts = [f"{theirs}experts.{e}." for e in range(cfg.n_routed_experts)]
    gate_up = tuple((e + "gate_proj.weight", e + "up_proj.weight") for e in experts)
    down = tuple((e + "down_proj.weight",) for e in experts)
    rules: list[Rule] = [Rename(ours + "router.weight", theirs + "gate.weight")]
    if cfg.has_expert_bias:
        rules.append(Rename(ours + "router.expert_bias", theirs + "gate.e_score_correction_bias"))
    rules.append(StackExperts(ours + "experts.w_gate_up", gate_up))
    rules.append(StackExperts(ours + "experts.w_down", down))
    if cfg.n_shared_experts:
        rules += mlp_rules(ours + "shared.", theirs + "shared_experts.")
    return rules


def mtp_rules(ours: str, theirs: str) -> list[Rule]:
    """What an MTP module adds to its layer."""
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
    return [Rename(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in names.items()]
