"""Time against length: a whole attention layer, projections and selection included.

Every layer's attention runs alone on random input, one sequence of each length: an eighth of the
context and on, doubling, up to the whole of it. Median of five runs, mean over the layers.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fathom.attention import Attention
from fathom.data.dataset import Dataset
from fathom.layers.step import Step
from fathom.model import Decoder
from fathom.probes.base import Context, Record, attentions

RUNS = 5


def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    lengths = [context.seq_len // part for part in (8, 4, 2, 1) if context.seq_len >= part]
    layers = attentions(model)
    forward = [mean(layers, model.cfg.dim, length, forward_only) for length in lengths]
    training = [mean(layers, model.cfg.dim, length, with_backward) for length in lengths]
    return {"tokens": lengths, "ms_forward": forward, "ms_forward_and_backward": training}


def mean(
    layers: list[Attention], dim: int, length: int, once: Callable[[Attention, Tensor], None]
) -> float:
    """Milliseconds of a layer on one sequence."""
    like = next(layers[0].parameters())
    x_BTD = torch.randn(1, length, dim, device=like.device, dtype=like.dtype)
    return statistics.mean(median(lambda part=part: once(part, x_BTD)) for part in layers) * 1e3


def median(once: Callable[[], None]) -> float:
    seconds = []
    once()  # what is done the first time alone does not count
    for _ in range(RUNS):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@torch.no_grad()
def forward_only(part: Attention, x_BTD: Tensor) -> None:
    part(x_BTD, Step.full(x_BTD[..., 0])).sum().item()  # waits for the device


def with_backward(part: Attention, x_BTD: Tensor) -> None:
    with torch.enable_grad():
        total = part(x_BTD, Step.full(x_BTD[..., 0])).float().sum()
        grads = torch.autograd.grad(total, list(part.parameters()), allow_unused=True)
    torch.stack([grad.float().sum() for grad in grads if grad is not None]).sum().item()
