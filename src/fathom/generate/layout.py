"""Weights laid out for decoding on a CPU: the same numbers in another order of memory.

One token at a time, a product is a pass over the weight. Of a weight ``[out, in]`` that has more
rows than columns (gate and up projections, the head), a pass along ``out`` reads long runs and one
along ``in`` short ones, which took twice as long where we measured it. So such weights are stored
columns first; and weights of one input (gate and up; queries, keys and values) as one, whose runs
are longer still. Shapes, values and files are as before; sums may round otherwise.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fathom.attention.mha import MHA
from fathom.ffn.dense import SwiGLU
from fathom.layers.linear import Linear, store_joined
from fathom.model import Decoder


def lay_out_for_decoding(model: Decoder) -> None:
    """Store float32 weights that are tall, or together are, columns first, in place, on a CPU.

    For models that are only read: training would go on from it, but not bitwise as without.
    """
    for layers in _of_one_input(model):
        weights = [layer.weight for layer in layers]
        tall = sum(len(weight) for weight in weights) > weights[0].shape[1]
        if (
            tall
            and all(map(_plain, weights))
            and not any(layer.bias is not None for layer in layers)
        ):
            store_joined(*layers)
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    if model.cfg.tie_embeddings:  # the embedding is the head
        weights.append(model.embed.weight)
    for weight in weights:
        if len(weight) > weight.shape[1] and _plain(weight):
            weight.data = weight.data.t().contiguous().t()


def _of_one_input(model: Decoder) -> Iterator[list[Linear]]:
    for part in model.modules():
        if isinstance(part, MHA):
            yield [part.wq, part.wk, part.wv]
        elif isinstance(part, SwiGLU):
            yield [part.w_gate, part.w_up]


def _plain(weight: Tensor) -> bool:
    """Whether it lies as it was loaded, in the type and place that this layout is for."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
