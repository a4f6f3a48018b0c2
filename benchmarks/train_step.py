"""A whole training step on one GPU: forward, backward, AdamW, beside transformers and torchtitan.

    python benchmarks/train_step.py [--cases moe-1.25b] [--peers transformers torchtitan] [--eager]

Pure bf16 weights and moments, AdamW for all (ours as in training, theirs ``fused``), the same
shapes, random tokens; median of 8 steps after 4. Ours compiles block by block, as ``train.compile``
does; transformers compiles the model (its ``grouped_mm`` experts, SDPA); torchtitan its blocks
(``torchtitan_peer.py``; left out where it cannot be imported), with cuDNN's attention or, as
``torchtitan-flex``, its own. A case with both peers takes about 100 s, most of it compiling.
``--eager`` adds ours without compiling. The record says for everyone where a step's time goes.
"""

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchtitan_peer
from kernel_times import kernel_times
from records import limits, milliseconds, row, spread, write

from fathom.attention import MHAConfig, MLAConfig
from fathom.config import ModelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.model import Losses, build_model
from fathom.presets import preset
from fathom.settings import override, parse, to_data
from fathom.sizing.size import size
from fathom.train.config import TrainConfig
from fathom.train.device import peak_flops
from fathom.train.graph import GradientGraphs
from fathom.train.optim import Optimizer

CASES = {  # preset, what to change of it, rows, tokens a row
    "moe-1.25b": ("moe-1.25b", (), 8, 2048),
    "v2-lite-8l": ("deepseek-v2-lite", ("groups.1.count=7",), 4, 4096),
    "dense-1b": ("llama-3.2-1b", (), 4, 4096),
}
LR = 1e-4


def config(name: str) -> ModelConfig:
    base, changes, *_ = CASES[name]
    return parse(ModelConfig, override(to_data(preset(base)), changes))


def our_step(
    name: str, tokens: torch.Tensor, *, compiled: bool, graph: bool = False
) -> Callable[[], None]:
    model = build_model(config(name), device="cuda", dtype=torch.bfloat16)
    optimizer = Optimizer(model, TrainConfig(steps=1))
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    targets, skip = tokens.roll(-1, dims=1), torch.zeros((), device="cuda")
    graphs = GradientGraphs(list(model.parameters()), add_up=False)
    rows = torch.arange(len(tokens) + 1, dtype=torch.int32, device="cuda") * tokens.shape[1]

    def backward(inputs: Sequence[torch.Tensor], denominator: int | torch.Tensor) -> Losses:
        tokens, targets, borders = inputs
        losses = model.loss(tokens, targets, borders, denominator=denominator)
        losses.total.backward()
        return losses

    def step() -> None:
        inputs = (tokens, targets, rows)
        if graph:
            losses = graphs(backward, inputs, tokens.numel(), kind=None, first=True)
        else:
            losses = backward(inputs, tokens.numel())
        optimizer.step(LR, skip)
        model.update_expert_bias([routed.tokens_per_expert for routed in losses.routing])
        model.zero_grad()

    return step


def with_adamw(model: torch.nn.Module, backward: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(name: str, tokens: torch.Tensor) -> Callable[[], None]:
    cfg = config(name)
    with torch.device("cuda"):
        model = (transformers_llama if len(cfg.groups) == 1 else transformers_deepseek)(cfg)
    compiled = torch.compile(model.to(torch.bfloat16))

    def backward() -> None:
        compiled(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return with_adamw(model, backward)


def transformers_llama(cfg: ModelConfig) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    (group,) = cfg.groups
    attention, ffn = group.attention, group.ffn
    assert isinstance(attention, MHAConfig)
    assert isinstance(ffn, DenseConfig)
    theirs = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        intermediate_size=ffn.inter_dim,
        num_hidden_layers=group.count,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        max_position_embeddings=cfg.max_seq_len,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(theirs)


def transformers_deepseek(cfg: ModelConfig) -> torch.nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

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
    model = DeepseekV3ForCausalLM(theirs)
    model.set_experts_implementation("grouped_mm")
    return model


def torchtitan_step(
    name: str, tokens: torch.Tensor, *, attention: torchtitan_peer.Attention = "sdpa"
) -> Callable[[], None]:
    cfg, length = config(name), tokens.shape[1]
    model = torchtitan_peer.build(cfg, length, attention=attention, device="cuda")
    assert sum(p.numel() for p in model.parameters()) == size(cfg, seq_len=length)["params"]
    masks = torchtitan_peer.causal(attention, length, "cuda")
    cross_entropy = torch.compile(torchtitan_peer.cross_entropy)
    targets = tokens.roll(-1, dims=1)

    def backward() -> None:
        cross_entropy(model(tokens, attention_masks=masks), targets).backward()

    return with_adamw(model, backward)


PEERS = {
    "transformers": transformers_step,
    "torchtitan": torchtitan_step,
    "torchtitan-flex": functools.partial(torchtitan_step, attention="flex"),
}


def measure(make: Callable[[], Callable[[], None]], n_tokens: int) -> dict[str, Any]:
    """Speed, peak memory and kernels of one way of stepping; all freed afterwards."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    times = milliseconds(step, repeats=8, warmup=4)
    return {
        "tokens_per_second": n_tokens / statistics.median(times) * 1e3,
        "spread": spread(times),
        "gb": torch.cuda.max_memory_allocated() / 1e9,
        "where": {"step": statistics.median(times), **kernel_times(step)},
    }


def measure_peers(
    name: str, tokens: torch.Tensor, chosen: list[str]
) -> dict[str, dict[str, float]]:
    found = {}
    for who in chosen:
        if who.startswith("torchtitan") and not torchtitan_peer.available():
            print(f"{name} {who}: torchtitan and spmd_types cannot be imported", flush=True)
            continue
        with torch._dynamo.config.patch(capture_scalar_outputs=False):  # torchtitan changes it
            try:
                found[who] = measure(lambda step=PEERS[who]: step(name, tokens), tokens.numel())
            except Exception as error:  # ours has been measured, and is to be written
                print(f"{name} {who} did not run: {str(error)[:400]}", flush=True)
                continue
        print(name, who, found[who], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    default = ["transformers", "torchtitan"]
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=default)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows, where, machine = [], {}, limits()
    for name in arguments.cases:
        cfg, (_, _, batch, length) = config(name), CASES[name]
        tokens = torch.randint(0, cfg.vocab_size, (batch, length), device="cuda")
        ours = measure(lambda t=tokens, n=name: our_step(n, t, compiled=True), tokens.numel())
        print(name, "ours", ours, flush=True)
        replayed = measure(
            lambda t=tokens, n=name: our_step(n, t, compiled=True, graph=True), tokens.numel()
        )
        print(name, "ours as a graph", replayed, flush=True)
        peers = measure_peers(name, tokens, arguments.peers)
        speeds = {who: one["tokens_per_second"] for who, one in peers.items()}
        memory = {who: one["gb"] for who, one in peers.items()}
        flops = 3 * size(cfg, seq_len=length)["flops_per_token_causal"]
        speed, peak = ours["tokens_per_second"], peak_flops(torch.device("cuda"))
        rows += [
            row(name, "tokens_per_second", "tokens/s", speed, speeds, spread=ours["spread"]),
            row(name, "peak_memory", "GB", ours["gb"], memory, higher_is_better=False),
            row(
                name + "-graph",
                "tokens_per_second",
                "tokens/s",
                replayed["tokens_per_second"],
                speeds,
                spread=replayed["spread"],
            ),
        ]
        if peak:
            used = {who: value * flops / peak for who, value in speeds.items()}
            rows.append(row(name, "mfu", "of the bf16 peak", speed * flops / peak, used))
        if arguments.eager:
            eager = measure(lambda t=tokens, n=name: our_step(n, t, compiled=False), tokens.numel())
            slow = eager["tokens_per_second"]
            rows.append(row(name + "-eager", "tokens_per_second", "tokens/s", slow, speeds))
        where[name] = {who: one["where"] for who, one in {"ours": ours, **peers}.items()}
        write("train_step", rows, machine, milliseconds=where)  # as far as it got


if __name__ == "__main__":
    main()
