"""A whole training step on one GPU: forward, backward, AdamW, against transformers compiled.

    python benchmarks/train_step.py [--out DIR] [--cases moe-1.25b]

Pure bf16 weights and moments, fused AdamW on both sides, the same shapes and random tokens;
median of 8 steps after 4. Ours compiles block by block, as ``train.compile`` does; transformers
compiles the model (its ``grouped_mm`` experts, SDPA). The peer runs in the same process.
"""

import argparse
import gc
import statistics

import torch
from records import limits, milliseconds, row, spread, write

from fathom.attention import MLAConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.model import build_model
from fathom.presets import preset
from fathom.sizing.size import size

CASES = {"moe-1.25b": (8, 2048)}  # preset: rows, tokens a row


def our_step(name: str, tokens: torch.Tensor, *, compiled: bool):
    model = build_model(preset(name), device="cuda", dtype=torch.bfloat16)
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

    cfg = preset(name)
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
    parser.add_argument("--out")
    torch.set_float32_matmul_precision("high")
    rows, machine = [], limits()
    for name in parser.parse_args().cases:
        batch, length = CASES[name]
        tokens = torch.randint(0, preset(name).vocab_size, (batch, length), device="cuda")
        ours = measure(lambda t=tokens, n=name: (our_step(n, t, compiled=True), t))
        eager = measure(lambda t=tokens, n=name: (our_step(n, t, compiled=False), t))
        torch.compiler.reset()
        peer = measure(lambda t=tokens, n=name: (transformers_step(n, t), t))
        peers = {"transformers": peer["tokens_per_second"]}
        flops = 3 * size(preset(name), seq_len=length)["flops_per_token_causal"]
        speed = ours["tokens_per_second"]
        rows += [
            row(name, "tokens_per_second", "tokens/s", speed, peers, spread=ours["spread"]),
            row(
                name + "-eager", "tokens_per_second", "tokens/s", eager["tokens_per_second"], peers
            ),
            row(name, "model_tflops", "TFLOP/s", speed * flops / 1e12, {}),
            row(
                name,
                "peak_memory",
                "GB",
                ours["gb"],
                {"transformers": peer["gb"]},
                higher_is_better=False,
            ),
        ]
    write("train_step", rows, machine)


if __name__ == "__main__":
    main()
