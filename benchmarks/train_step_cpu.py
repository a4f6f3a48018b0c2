"""A training step on the CPU: what generality costs, and what a mixture of experts costs.

    python benchmarks/train_step_cpu.py [--out DIR]

``tiny-llama`` against a minimal loop written by hand here: the same shapes, data, AdamW and
clipping, nothing configurable. ``tiny-moe`` against a dense model of equal active FLOPs. Pairs of
steps are timed alternately, float32; the ratio is the median over the pairs' ratios.
"""

import statistics
import time
from collections.abc import Callable

import torch
from records import limits, row, spread, write
from torch import Tensor, nn
from torch.nn import functional as F

from fathom.attention import MHAConfig
from fathom.config import ModelConfig
from fathom.ffn import DenseConfig, MoEConfig
from fathom.model import build_model
from fathom.presets import preset
from fathom.settings import override, parse, to_data
from fathom.train.config import read_run_config
from fathom.train.optim import Optimizer, clip_factor, gradient_norm

ROWS, LENGTH, PAIRS = 16, 256, 12


class MinimalBlock(nn.Module):
    """Llama's block in as few lines as it takes."""

    def __init__(self, dim: int, heads: int, inter: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(dim, inter, bias=False) for _ in range(2))
        self.down = nn.Linear(inter, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            w(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Minimal(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        group = cfg.groups[0]
        assert isinstance(group.attention, MHAConfig)
        assert isinstance(group.ffn, DenseConfig)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        heads, inter = group.attention.n_heads, group.ffn.inter_dim
        self.blocks = nn.ModuleList(
            MinimalBlock(cfg.dim, heads, inter) for _ in range(cfg.n_layers)
        )
        self.norm = nn.RMSNorm(cfg.dim, 1e-5)
        self.tied = cfg.tie_embeddings
        if not self.tied:
            self.head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        half = cfg.dim // heads // 2
        angle = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.embed.weight if self.tied else self.head.weight)


def minimal_step(cfg: ModelConfig, tokens: Tensor, targets: Tensor) -> Callable[[], None]:
    model = Minimal(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def step() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(cfg: ModelConfig, tokens: Tensor, targets: Tensor) -> Callable[[], None]:
    """What ``fathom.train`` does in a step, the data loader and the records left out."""
    run = {"model": to_data(cfg), "train": {"steps": 1, "lr": 1e-3, "tokens_per_step": 4096}}
    train = read_run_config(run).train
    model = build_model(cfg)
    optimizer = Optimizer(model, train)

    def step() -> None:
        losses = model.loss(tokens, targets, denominator=tokens.numel())
        losses.total.backward()
        scale = clip_factor(gradient_norm(model), 1.0)
        optimizer.step(1e-3, torch.zeros(()), scale)
        model.update_expert_bias([routed.tokens_per_expert for routed in losses.routing])
        model.zero_grad()

    return step


def dense_twin(cfg: ModelConfig) -> ModelConfig:
    """The same model with a dense FFN as wide as what a token of the MoE reads."""
    experts = cfg.groups[-1].ffn
    assert isinstance(experts, MoEConfig)
    width = experts.inter_dim * (experts.top_k + experts.n_shared_experts)
    ffn = f"groups.*.ffn={{kind='dense', inter_dim={width}}}"
    return parse(ModelConfig, override(to_data(cfg), [ffn]))


def compare(ours: Callable[[], None], theirs: Callable[[], None]) -> dict[str, float]:
    """Median tokens per second of both, and the median over pairs of ours / theirs."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(PAIRS + 2):
        for name, step in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            step()
            if pair >= 2:
                times[name].append(time.perf_counter() - start)
    pairs = zip(times["ours"], times["theirs"], strict=True)
    return {
        "ours": ROWS * LENGTH / statistics.median(times["ours"]),
        "theirs": ROWS * LENGTH / statistics.median(times["theirs"]),
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        "spread": spread(times["ours"]),
    }


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 1024, (ROWS, LENGTH))
    targets = tokens.roll(-1, dims=1)
    llama, moe = preset("tiny-llama"), preset("tiny-moe")
    cases = {
        "tiny-llama": ("by-hand", our_step(llama, tokens, targets), minimal_step),
        "tiny-moe": ("dense-twin", our_step(moe, tokens, targets), our_step),
    }
    rows = []
    for name, (peer, ours, make) in cases.items():
        cfg = llama if name == "tiny-llama" else dense_twin(moe)
        found = compare(ours, make(cfg, tokens, targets))
        line = row(
            name,
            "tokens_per_second",
            "tokens/s",
            found["ours"],
            {peer: found["theirs"]},
            spread=found["spread"],
        )
        rows.append(line | {"ratio_to_best_peer": found["ratio"]})
    write("train_step_cpu", rows, limits())


if __name__ == "__main__":
    main()
