"""Configs of DeepSeek's and of Meta's own files, as a ``config.json`` of Hugging Face.

DeepSeek's is that of the inference code of the DeepSeek-V3 repository, whose defaults it keeps;
Meta's is ``params.json``. Keys that are not known here are refused.
"""

from collections.abc import Mapping
from typing import Any

from fathom.convert.hf_config import LONG, TINY, HFConfig

Data = Mapping[str, Any]

DEEPSEEK_KEYS = {  # theirs: Hugging Face's, and the default of the inference code
    "vocab_size": ("vocab_size", 102400),
    "dim": ("hidden_size", 2048),
    "inter_dim": ("intermediate_size", 10944),
    "moe_inter_dim": ("moe_intermediate_size", 1408),
    "n_layers": ("num_hidden_layers", 27),
    "n_dense_layers": ("first_k_dense_replace", 1),
    "n_heads": ("num_attention_heads", 16),
    "n_routed_experts": ("n_routed_experts", 64),
    "n_shared_experts": ("n_shared_experts", 2),
    "n_activated_experts": ("num_experts_per_tok", 6),
    "n_expert_groups": ("n_group", 1),
    "n_limited_groups": ("topk_group", 1),
    "score_func": ("scoring_func", "softmax"),
    "route_scale": ("routed_scaling_factor", 1.0),
    "q_lora_rank": ("q_lora_rank", 0),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
    "max_seq_len": ("max_position_embeddings", 16384),
    "rope_theta": ("rope_theta", 10000.0),
}
INDEXER_KEYS = ("index_n_heads", "index_head_dim", "index_topk")  # of V3.2, named as by HF
YARN = {"rope_factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
UNUSED = ("dtype", "scale_fmt", "max_batch_size", "original_seq_len")


def is_deepseek(data: Data) -> bool:
    return "model_type" not in data and "n_activated_experts" in data


def deepseek_config(data: Data, source: str) -> dict[str, Any]:
    """Hugging Face's ``config.json`` for DeepSeek's own. YaRN acts if the context is stretched.

    Raises:
        CheckpointError: a key that is not known.
    """
    _only_known(data, {*DEEPSEEK_KEYS, *INDEXER_KEYS, *YARN, *UNUSED}, source)
    found = {hf: data.get(key, default) for key, (hf, default) in DEEPSEEK_KEYS.items()}
    hf = HFConfig({"original_seq_len": 4096, "max_seq_len": 16384, **data}, source)
    original = hf.integer("original_seq_len", most=LONG)
    if hf.integer("max_seq_len", most=LONG) > original:
        yarn = {**YARN, **{key: data[key] for key in YARN if key in data}}
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn["rope_factor"],
            "original_max_position_embeddings": original,
            "beta_fast": yarn["beta_fast"],
            "beta_slow": yarn["beta_slow"],
            "mscale": yarn["mscale"],
            "mscale_all_dim": yarn["mscale"],
        }
    sigmoid = found["scoring_func"] == "sigmoid"
    groups = found["n_group"] != 1
    indexer = {key: data[key] for key in INDEXER_KEYS if key in data}
    version = "V32" if indexer else "V3" if sigmoid else "V2"
    return {
        **found,
        **indexer,
        "architectures": [f"Deepseek{version}ForCausalLM"],
        "model_type": f"deepseek_{version.lower()}",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups else "greedy",
        "norm_topk_prob": sigmoid,
        "q_lora_rank": found["q_lora_rank"] or None,
        "num_key_value_heads": found["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }


META_KEYS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "max_seq_len",
    "max_batch_size",
    "model_parallel_size",
)


def meta_config(data: Data, source: str) -> dict[str, Any]:
    """Hugging Face's ``config.json`` for Meta's ``params.json``.

    Raises:
        CheckpointError: a key that is not known, or a stretched RoPE that does not say how far.
    """
    _only_known(data, set(META_KEYS), source)
    hf = HFConfig(data, source)
    found = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": hf.integer("vocab_size", most=2**20),
        "hidden_size": hf.integer("dim"),
        "intermediate_size": hf.integer("hidden_dim", _meta_inter_dim(hf), most=2**20),
        "num_hidden_layers": hf.integer("n_layers", most=1000),
        "num_attention_heads": hf.integer("n_heads", most=TINY),
        "num_key_value_heads": hf.data.get("n_kv_heads"),
        "head_dim": hf.data.get("head_dim"),
        "rms_norm_eps": hf.number("norm_eps", 1e-5),
        "rope_theta": hf.number("rope_theta", 10000.0),
        "max_position_embeddings": hf.integer("max_seq_len", 4096, most=LONG),
        "hidden_act": "silu",
    }
    if hf.flag("use_scaled_rope"):  # 8 in Llama 3.1, 32 in 3.2: the file must say which
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": hf.number("rope_scaling_factor"),
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    return {key: value for key, value in found.items() if value is not None}


def _meta_inter_dim(hf: HFConfig) -> int:
    """Two thirds of four times the width, stretched, and rounded up."""
    inter_dim = int(2 * 4 * hf.integer("dim") / 3)
    inter_dim = int(hf.number("ffn_dim_multiplier", 1.0) * inter_dim)
    unit = hf.integer("multiple_of", 256)
    return -(-inter_dim // unit) * unit


def _only_known(data: Data, known: set[str], source: str) -> None:
    for key in data:
        if key not in known:
            raise HFConfig(data, source).refuse(key, "which is not followed here")
