"""What an optimizer step costs: fused AdamW, and Muon over stacked experts.

    python benchmarks/optimizer.py [--cases adamw-1.25b muon-1.25b] [--out DIR]

All of a model's parameters, gradients and moments in bf16, as ``train_step.py`` has them. AdamW
reads and writes 14 bytes a parameter; beside it stand ``torch.optim.AdamW``, fused and by
``foreach``. Muon iterates Newton-Schulz for the hidden matrices, experts of one shape as one batch,
and leaves the rest to AdamW; its peer ``torch.optim.Muon`` takes one matrix after the other, and
for it the stacks are taken apart beforehand.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Iterable

import torch
from records import limits, milliseconds, row, spread, write
from torch import Tensor
from torch.nn import Parameter
from train_step import config

from fathom.model import build_model
from fathom.train.config import TrainConfig
from fathom.train.optim import Optimizer, is_hidden_matrix, matrices

CASES = {  # optimizer, model of train_step.py
    "adamw-1.25b": ("adamw", "moe-1.25b"),
    "adamw-v2-lite-8l": ("adamw", "v2-lite-8l"),
    "muon-1.25b": ("muon", "moe-1.25b"),
}
BYTES = 14  # AdamW's traffic for a bf16 parameter: 4 tensors read, 3 written
LR = 1e-4
Named = dict[str, Parameter]


def with_gradients(model_name: str) -> torch.nn.Module:
    model = build_model(config(model_name), device="cuda", dtype=torch.bfloat16)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    return model


def ours(kind: str, model: torch.nn.Module) -> Callable[[], object]:
    optimizer = Optimizer(model, TrainConfig(steps=1, optimizer=kind))
    skip = torch.zeros((), device="cuda")
    return lambda: optimizer.step(LR, skip)


def torch_adamw(model: torch.nn.Module, **how: bool) -> Callable[[], object]:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, **how).step


def torch_muon(model: torch.nn.Module) -> Callable[[], object]:
    """Every matrix on its own, and AdamW for the rest."""
    params = dict(model.named_parameters())
    hidden = {name for name, p in params.items() if is_hidden_matrix(name, p)}
    apart = [one for name in hidden for one in taken_apart(name, params[name])]
    first = torch.optim.Muon(apart, lr=LR, adjust_lr_fn="match_rms_adamw")
    second = torch.optim.AdamW([params[n] for n in params.keys() - hidden], lr=LR, fused=True)

    def step() -> None:
        first.step()
        second.step()

    return step


def taken_apart(name: str, weight: Parameter) -> Iterable[Parameter]:
    assert isinstance(weight.grad, Tensor)
    stacks = matrices(name, weight.detach()), matrices(name, weight.grad)
    for matrix, grad in zip(*stacks, strict=True):
        one = Parameter(matrix)
        one.grad = grad
        yield one


PEERS: dict[str, dict[str, Callable[[torch.nn.Module], Callable[[], object]]]] = {
    "adamw": {
        "torch-fused": lambda model: torch_adamw(model, fused=True),
        "torch-foreach": lambda model: torch_adamw(model, foreach=True),
    },
    "muon": {"torch": torch_muon},
}


def rows_of(name: str) -> list[dict[str, object]]:
    kind, model_name = CASES[name]
    model = with_gradients(model_name)
    ways = {"ours": lambda m: ours(kind, m), **PEERS[kind]}
    times = {}
    for who, make in ways.items():
        gc.collect()
        torch.cuda.empty_cache()
        times[who] = milliseconds(make(model), repeats=6, warmup=2)
        print(name, who, statistics.median(times[who]), flush=True)
    wide = spread(times["ours"])
    found = {who: statistics.median(values) for who, values in times.items()}
    mine = found.pop("ours")
    lines = [row(name, "ms", "ms", mine, found, spread=wide, higher_is_better=False)]
    if kind == "adamw":
        traffic = BYTES * sum(p.numel() for p in model.parameters()) / 1e9
        rates = {who: traffic / ms for who, ms in found.items()}
        lines.append(row(name, "traffic", "TB/s", traffic / mine, rates, spread=wide))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows, machine = [], limits()
    for name in arguments.cases:
        rows += rows_of(name)
        write("optimizer", rows, machine)  # as far as it got


if __name__ == "__main__":
    main()
