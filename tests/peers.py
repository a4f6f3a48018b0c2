"""Tiny random models of transformers, saved as it saves them, with what it computes from them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
}
MLA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
}
V2 = {**MLA, "model_type": "deepseek_v2", "topk_method": "greedy", "routed_scaling_factor": 1.0}
V3 = {
    **MLA,
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}

V32 = {
    **{key: value for key, value in V3.items() if key != "rope_interleave"},
    "model_type": "deepseek_v32",
    "index_n_heads": 16,
    "index_head_dim": 10,
    "index_topk": 7,
}


def yarn(mscale: float | None = None, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, **more}
    return rope if mscale is None else {**rope, "mscale": mscale, "mscale_all_dim": mscale}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-head-dim": {**LLAMA, "head_dim": 12, "num_key_value_heads": 1},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-llama3": {**LLAMA, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama-linear": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-dynamic": {
        **LLAMA,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        "max_position_embeddings": 16,
    },
    "llama-yarn": {**LLAMA, "rope_scaling": yarn(truncate=False)},
    "v2-lite": {**V2, "q_lora_rank": None, "rope_scaling": yarn(0.707)},
    "v2": {
        **V2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "rope_scaling": yarn(1.0),
        "attention_bias": True,
    },
    "v3": {**V3, "rope_scaling": yarn(1.0)},
    "moonlight": {**V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_theta": 5e4},
    "v3.2": {**V32, "rope_scaling": yarn(1.0)},
    "v3-half-split": {**V3, "rope_interleave": False},
}
IDS = torch.tensor(
    [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19]]
)
NEW_TOKENS = 64


@dataclass(frozen=True)
class Peer:
    """What transformers saved, and what it computes: float32, eager."""

    folder: Path
    logits: Tensor
    greedy: list[int]


def make_peer(config: dict[str, Any], folder: Path) -> Peer:
    model = hf_model(config)
    model.save_pretrained(folder)
    return Peer(folder, hf_logits(model), hf_greedy(model))


def hf_model(config: dict[str, Any]) -> Any:
    """A model with random weights, none of them at a value that would hide a mistake."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: value for key, value in config.items() if key != "model_type"}
    cfg = AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(rest)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key:
                tensor.normal_(1, 0.2)
            elif "e_score_correction_bias" in key:
                tensor.normal_(0, 0.1)
            elif not (key == "lm_head.weight" and cfg.tie_word_embeddings):
                tensor.normal_(0, 0.15)
    return model


def hf_load(folder: Path, **options: Any) -> Any:
    """A folder as transformers loads it; a key that it misses or does not know is an error."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def hf_logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def hf_greedy(model: Any) -> list[int]:
    """The 64 tokens after ``IDS``, the likeliest each time."""
    out = model.generate(IDS, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, IDS.shape[1] :].tolist()
