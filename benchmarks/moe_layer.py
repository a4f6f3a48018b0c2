"""An expert layer alone, router included, forward and backward: ours, plain PyTorch, transformers.

    python benchmarks/moe_layer.py [--out DIR] [--cases v2-lite fine-grained] [--parts | --sweep]

Random tokens and weights in bf16, no shared experts; sigmoid scores, normalised. FLOPs are those of
the experts' three products, forward and backward (``18 T K D H``). "torch" is a stable argsort, a
gather, ``F.grouped_mm``, SwiGLU, ``F.grouped_mm``, and a weighted ``index_add_`` in float32; it
runs eagerly and compiled. SonicMoE, with the tiles it is shipped with, joins where it can be
imported. ``--parts`` also times each pass of the layer on its own.

``--sweep`` follows one shape along tokens, experts, choices and width instead; ours and "torch"
run eagerly as CUDA graphs. Its roofline lets every product take what its FLOPs or its bytes take at
the machine's limits, and all else nothing.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping

import torch
from records import as_graph, limits, milliseconds, row, spread, write
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu

from fathom.ffn import MoEConfig
from fathom.ffn.moe import MoE
from fathom.ops import sort_by_expert
from fathom.ops.grouped_mm import torch_outer, torch_product
from fathom.ops.triton import permute, swiglu

CASES = {  # tokens, dim, one expert's width, experts, top-k
    "v2-lite": (32768, 2048, 1408, 64, 6),
    "v3-rank": (8192, 7168, 2048, 32, 8),
    "fine-grained": (32768, 1024, 512, 128, 8),
}

BASE = {"tokens": 16384, "dim": 2048, "inner": 1024, "experts": 64, "topk": 8}
SWEEP = {
    "tokens": [1024 * 2**i for i in range(7)],
    "experts": [8 * 2**i for i in range(7)],
    "topk": [1, 2, 4, 8, 16],
    "dim": [256, 512, 1024, 2048, 4096, 7168],  # an expert is half as wide
}


def our_layer(case: tuple[int, ...]) -> MoE:
    _, dim, inner, n_experts, top_k = case
    cfg = MoEConfig(
        n_routed_experts=n_experts,
        top_k=top_k,
        inter_dim=inner,
        score_func="sigmoid",
        norm_topk_prob=True,
    )
    layer = cfg.build(dim).to("cuda", torch.bfloat16)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return layer


def plain(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, top_k: int) -> Tensor:
    """The peer that needs nothing but PyTorch."""
    scores, ids = linear(x.float(), router.float()).sigmoid().topk(top_k, dim=-1)
    gates = (scores / scores.sum(-1, keepdim=True)).flatten()
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    experts = torch.arange(len(router), device=x.device)
    ends = torch.searchsorted(flat[order], experts, right=True, out_int32=True)
    gate, up = grouped_mm(x[order // top_k], w_gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = grouped_mm(silu(gate) * up, w_down.mT, offs=ends)
    y = y.float() * gates[order][:, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // top_k, y).to(x.dtype)


def trained(layer: Callable[[Tensor], Tensor], tokens: int, dim: int) -> Callable[[], None]:
    """Forward and backward; gradients are dropped."""
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)

    def run() -> None:
        layer(x).backward(grad)
        x.grad = None

    return run


def measure(make: Callable[[], Callable[[], None]]) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = make()
    times = milliseconds(run, repeats=10, warmup=4)
    return {
        "ms": statistics.median(times),
        "spread": spread(times),
        "gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def routed(layer: MoE) -> Callable[[Tensor], Tensor]:
    """The layer without its shared experts and its statistics."""

    def forward(x: Tensor) -> Tensor:
        choice = layer.router(x)
        sending = layer.dispatcher.dispatch(x, choice.expert_ids_NK)
        return sending.through(layer.experts, choice.gates_NK)

    return forward


def ours(case: tuple[int, ...]) -> Callable[[], None]:
    layer = our_layer(case)
    function = torch.compile(routed(layer), fullgraph=True)

    def forward(x: Tensor) -> Tensor:
        layer.zero_grad()
        return function(x)

    return trained(forward, case[0], case[1])


def peer(case: tuple[int, ...], *, compiled: bool) -> Callable[[], None]:
    layer = our_layer(case)
    weights = layer.router.weight, layer.experts.w_gate_up, layer.experts.w_down
    function = torch.compile(plain) if compiled else plain

    def forward(x: Tensor) -> Tensor:
        layer.zero_grad()
        return function(x, *weights, case[4])

    return trained(forward, case[0], case[1])


def transformers_layer(case: tuple[int, ...]) -> Callable[[], None]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    tokens, dim, inner, n_experts, top_k = case
    cfg = DeepseekV3Config(
        hidden_size=dim,
        moe_intermediate_size=inner,
        n_routed_experts=n_experts,
        num_experts_per_tok=top_k,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
    )
    cfg._experts_implementation = "grouped_mm"
    layer = DeepseekV3MoE(cfg).to("cuda", torch.bfloat16)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    layer.shared_experts = torch.nn.Identity()  # their work is not counted

    def forward(x: Tensor) -> Tensor:
        layer.zero_grad()
        return layer(x[None])[0]

    return trained(forward, tokens, dim)


def sonicmoe_layer(case: tuple[int, ...]) -> Callable[[], None]:
    import quack.autotuner
    from sonicmoe import MoE as SonicMoE
    from sonicmoe.enums import ActivationType

    def untuned(tuner, *args, **kwargs):  # tuning compiles dozens of kernels a shape
        return tuner.fn(*args, **{**kwargs, "config": None})

    quack.autotuner.Autotuner.__call__ = untuned
    tokens, dim, inner, n_experts, top_k = case
    layer = SonicMoE(
        num_experts=n_experts,
        num_experts_per_tok=top_k,
        hidden_size=dim,
        intermediate_size=inner,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to("cuda", torch.bfloat16)

    def forward(x: Tensor) -> Tensor:
        layer.zero_grad()
        return layer(x)[0]

    return trained(forward, tokens, dim)


def parts(case: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of every pass of the layer on its own."""
    tokens, dim, _, n_experts, top_k = case
    layer = our_layer(case)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    choice = layer.router(x)
    order, inverse, ends, _ = sort_by_expert(choice.expert_ids_NK, n_experts)
    gates = choice.gates_NK.detach().flatten()
    w1, w2 = layer.experts.w_gate_up.detach(), layer.experts.w_down.detach()
    rows = permute.gather_rows(x, order, inverse, top_k)
    h = torch_product(rows, w1.mT, ends)
    a = swiglu.swiglu(h, gates, order)
    da = torch.randn_like(a)
    runs: dict[str, Callable[[], object]] = {
        "router": lambda: layer.router(x.detach()),
        "sort": lambda: sort_by_expert(choice.expert_ids_NK, n_experts),
        "gather": lambda: permute.gather_rows(x, order, inverse, top_k),
        "gather-sum": lambda: permute.gather_sum(rows, inverse.view(-1, top_k)),
        "up": lambda: torch_product(rows, w1.mT, ends),
        "swiglu": lambda: swiglu.swiglu(h, gates, order),
        "down": lambda: torch_product(a, w2.mT, ends),
        "d-down": lambda: torch_product(rows, w2, ends),
        "d-swiglu": lambda: swiglu.swiglu_backward(h, gates, order, da),
        "dw-down": lambda: torch_outer(rows, a, ends),
        "dw-up": lambda: torch_outer(h, rows, ends),
        "d-up": lambda: torch_product(h, w1, ends),
    }
    found = {}
    for name, run in runs.items():
        found[name] = statistics.median(milliseconds(run, repeats=6, warmup=2))
        print(f"  {name:<40} {found[name]:.3f} ms", flush=True)
    return found


def roofline(case: tuple[int, ...], machine: Mapping[str, float]) -> float:
    """TFLOP/s if every product ran at the faster limit that binds it, and all else were free."""
    tokens, dim, inner, n_experts, top_k = case
    rows, milliseconds = tokens * top_k, 0.0
    for wide, narrow in ((dim, 2 * inner), (inner, dim)):  # up, down
        work = 2 * rows * wide * narrow / 1e9 / machine["gemm_tflops"]
        numbers = rows * (wide + narrow) + n_experts * wide * narrow
        moved = 2 * numbers / 1e9 / machine["copy_tb_per_s"]
        milliseconds += 3 * max(work, moved)  # forward, of the input, of the weight
    return 18 * rows * dim * inner / 1e9 / milliseconds


def swept() -> dict[str, tuple[int, ...]]:
    """The base shape with one number changed, by ``axis-value``."""
    cases = {}
    for axis, values in SWEEP.items():
        for value in values:
            shape = BASE | {axis: value}
            if axis == "dim":
                shape["inner"] = value // 2
            cases[f"{axis}-{value}"] = tuple(shape.values())
    return cases


def graphed(layer: MoE, function: Callable[[Tensor], Tensor], tokens: int) -> Callable[[], None]:
    """Forward and backward of a function of tokens and the layer's weights."""
    dim = layer.router.weight.shape[1]
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    wanted = (x, *layer.parameters())
    return as_graph(lambda: torch.autograd.grad(function(x), wanted, grad))


def sweep(machine: Mapping[str, float]) -> None:
    rows, limit = [], {}
    for name, case in swept().items():
        tokens, dim, inner, _, top_k = case
        layer = our_layer(case)
        weights = layer.router.weight, layer.experts.w_gate_up, layer.experts.w_down
        ways = {"ours": routed(layer), "torch": lambda x, w=weights, k=top_k: plain(x, *w, k)}
        found = {
            who: measure(lambda way=way, one=layer, n=tokens: graphed(one, way, n))
            for who, way in ways.items()
        }
        speed = {who: 18 * tokens * top_k * dim * inner / 1e9 / f["ms"] for who, f in found.items()}
        limit[name] = roofline(case, machine)
        print(name, speed, limit[name], flush=True)
        mine, wide = speed.pop("ours"), found["ours"]["spread"]
        rows.append(row(name, "fwd_bwd", "TFLOP/s", mine, speed, spread=wide))
        write("moe_layer_scaling", rows, machine, base=BASE, roofline=limit)  # as far as it got


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows, passes, machine = [], {}, limits()
    if arguments.sweep:
        return sweep(machine)
    for name in arguments.cases:
        case = CASES[name]
        tokens, dim, inner, _, top_k = case
        work = 18 * tokens * top_k * dim * inner / 1e9
        if arguments.parts:
            passes[name] = parts(case)
        found = {
            "ours": measure(lambda c=case: ours(c)),
            "torch-compiled": measure(lambda c=case: peer(c, compiled=True)),
            "torch": measure(lambda c=case: peer(c, compiled=False)),
        }
        for who, make in {"transformers": transformers_layer, "sonicmoe": sonicmoe_layer}.items():
            try:
                found[who] = measure(lambda c=case, make=make: make(c))
            except (ImportError, RuntimeError, TypeError, AttributeError) as error:
                print(f"{who} did not run {name}: {error}", flush=True)
        torch.compiler.reset()
        speed = {who: work / one["ms"] for who, one in found.items()}
        memory = {who: one["gb"] for who, one in found.items()}
        print(name, {who: round(value) for who, value in speed.items()}, memory, flush=True)
        mine = speed.pop("ours")
        rows.append(row(name, "fwd_bwd", "TFLOP/s", mine, speed, spread=found["ours"]["spread"]))
        mine = memory.pop("ours")
        rows.append(row(name, "peak_memory", "GB", mine, memory, higher_is_better=False))
        write("moe_layer", rows, machine, passes=passes)  # as far as it got


if __name__ == "__main__":
    main()
