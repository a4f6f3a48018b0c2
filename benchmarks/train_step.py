"""A whole training step on one GPU: forward, backward, AdamW, against transformers compiled.

    python benchmarks/train_step.py [--out DIR] [--cases moe-1.25b v2-lite-8l dense-1b] [--alone]

Pure bf16 weights and moments, fused AdamW on both sides, the same shapes and random tokens;
median of 8 steps after 4. Ours compiles block by block, as ``train.compile`` does; transformers
compiles the model (its ``grouped_mm`` experts, SDPA). The peer runs in the same process;
``--alone`` leaves it out. It is a DeepSeek, so the dense Llama has none.
"""

import argparse
import gc
import statistics

import torch
from records import limits, milliseconds, row, spread, write

from fathom.attention import MLAConfig
from fathom.config import ModelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.model import build_model
from fathom.presets import preset
from fathom.settings import override, parse, to_data
from fathom.sizing.size import size

CASES = {  # preset, what to change of it, rows, tokens a row
    "moe-1.25b": ("moe-1.25b", (), 8, 2048),
    "v2-lite-8l": ("deepseek-v2-lite", ("groups.1.count=7",), 4, 4096),
    "dense-1b": ("llama-3.2-1b", (), 4, 4096),
}


def config(name: str) -> ModelConfig:
    base, changes, *_ = CASES[name]
    return parse(ModelConfig, override(to_data(preset(base)), changes))


def our_step(name: str, tokens: torch.Tensor, *, compiled: bool):
    model = build_model(config(name), device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    targets = tokens.roll(-1, dims=1)

    def step() -> None:
        losses = model.loss(tokens, targets, denominator=tokens.numel())
        losses.total.backward()
        optimizer.step()
        model.update_expert_bias([routed.tokens_per_expert for routed in losses.routing])
        optimizer.zero_grad()

    return step


def transformers_step(name: str, tokens: torch.Tensor):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    cfg = config(name)
    first, last = cfg.groups[0], cfg.groups[-1]
    attention, experts = last.attention, last.ffn
    assert isinstance(attention, MLAConfig)
    assert isinstance(experts, MoEConfig)
    assert isinstance(first.ffn, DenseConfig)
    theirs = DeepseekV3Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        intermediate_size=first.ffn.inter_dim,
        moe_intermediate_size=experts.inter_dim,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_heads,
        n_shared_experts=experts.n_shared_experts,
        n_routed_experts=experts.n_routed_experts,
        num_experts_per_tok=experts.top_k,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        v_head_dim=attention.v_head_dim,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=first.count,
        max_position_embeddings=cfg.max_seq_len,
        attn_implementation="sdpa",
    )
    theirs._experts_implementation = "grouped_mm"
    model = DeepseekV3ForCausalLM(theirs).to("cuda", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)

    def step() -> None:
        compiled(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(make) -> dict[str, float]:
    """Tokens per second, spread and peak memory of one way of stepping; all freed afterwards."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, tokens = make()
    times = milliseconds(step, repeats=8, warmup=4)
    return {
        "tokens_per_second": tokens.numel() / statistics.median(times) * 1e3,
        "spread": spread(times),
        "gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows, machine = [], limits()
    for name in arguments.cases:
        cfg, (_, _, batch, length) = config(name), CASES[name]
        tokens = torch.randint(0, cfg.vocab_size, (batch, length), device="cuda")
        ours = measure(lambda t=tokens, n=name: (our_step(n, t, compiled=True), t))
        print(name, "ours", ours, flush=True)
        peers: dict[str, dict[str, float]] = {}
        if not arguments.alone and isinstance(cfg.groups[-1].ffn, MoEConfig):
            torch.compiler.reset()
            peer = measure(lambda t=tokens, n=name: (transformers_step(n, t), t))
            peers = {"transformers": peer}
        eager = measure(lambda t=tokens, n=name: (our_step(n, t, compiled=False), t))
        torch.compiler.reset()
        speeds = {who: one["tokens_per_second"] for who, one in peers.items()}
        memory = {who: one["gb"] for who, one in peers.items()}
        flops = 3 * size(cfg, seq_len=length)["flops_per_token_causal"]
        speed, slow = ours["tokens_per_second"], eager["tokens_per_second"]
        rows += [
            row(name, "tokens_per_second", "tokens/s", speed, speeds, spread=ours["spread"]),
            row(name + "-eager", "tokens_per_second", "tokens/s", slow, speeds),
            row(name, "model_tflops", "TFLOP/s", speed * flops / 1e12, {}),
            row(name, "peak_memory", "GB", ours["gb"], memory, higher_is_better=False),
        ]
    write("train_step", rows, machine)


if __name__ == "__main__":
    main()
