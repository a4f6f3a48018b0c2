"""What a probe is: a measurement of any trained model, as a function and a line in ``PROBES``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fathom.attention import Attention
from fathom.data.dataset import Dataset
from fathom.data.loader import EvalBatch, heldout_batches
from fathom.layers.step import Step
from fathom.model import Decoder

Record = dict[str, Any]  # JSON: numbers, lists, tables of them


@dataclass(frozen=True, kw_only=True)
class Context:
    """How much a probe looks at.

    Args:
        seq_len: tokens a row, as the model was trained.
        seed: of whatever a probe draws.
        batch_size: rows a forward.
        max_bytes: held-out bytes read of each domain.
    """

    seq_len: int
    seed: int = 0
    batch_size: int = 16
    max_bytes: int = 20_000


class Probe(NamedTuple):
    """``run(model, dataset, context)`` gives a record; ``{}`` where it does not apply."""

    about: str
    run: Callable[[Decoder, Dataset, Context], Record]


def heldout(model: Decoder, dataset: Dataset, domain: str, context: Context) -> Iterator[EvalBatch]:
    """Held-out rows of a domain, on the model's device."""
    device = model.embed.weight.device
    for batch in heldout_batches(
        dataset,
        domain,
        seq_len=context.seq_len,
        batch_size=context.batch_size,
        max_bytes=context.max_bytes,
    ):
        parts = (batch.tokens, batch.targets, batch.cu_seqlens, batch.documents)
        yield EvalBatch(*(part.to(device) for part in parts))


def text_domains(dataset: Dataset) -> list[str]:
    return [domain for domain in dataset.domains if dataset.kind(domain) == "text"]


def longest_passage(model: Decoder, dataset: Dataset, length: int, seed: int) -> Tensor:
    """``[1, length]`` held-out text tokens: documents of all text domains end to end, repeated."""
    generator = torch.Generator().manual_seed(seed)
    documents = [
        torch.from_numpy(dataset.document("heldout", domain, i).astype("int64"))
        for domain in text_domains(dataset)
        for i in range(dataset.documents("heldout", domain))
    ]
    order = torch.randperm(len(documents), generator=generator).tolist()
    text = torch.cat([documents[i] for i in order])
    copies = -(-length // len(text))
    return text.repeat(copies)[:length][None].to(model.embed.weight.device)


def attentions(model: Decoder) -> list[Attention]:
    """The attention of each layer, bottom to top."""
    parts = [block.get_submodule("attention") for block in model.blocks]
    return [part for part in parts if isinstance(part, Attention)]


@contextmanager
def attention_inputs(model: Decoder) -> Iterator[list[tuple[Tensor, Step]]]:
    """Collects each layer's attention input ``(x_BTD, step)`` during a forward, layer by layer."""
    seen: list[tuple[Tensor, Step]] = []

    def collect(block: nn.Module, inputs: tuple[Tensor, Step]) -> None:
        seen.append((block.get_submodule("attention_norm")(inputs[0]), inputs[1]))

    hooks = [block.register_forward_pre_hook(collect) for block in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
