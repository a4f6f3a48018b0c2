"""Weights laid out for decoding on a CPU: the same numbers in another order of memory.

One token at a time, a product is a pass over the weight. Of a weight ``[out, in]`` that has more
rows than columns (gate and up projections, the head), a pass along ``out`` reads long runs and one
along ``in`` short ones, which took twice as long where we measured it. So such weights are stored
columns first. Shapes, values and files are as before; sums may round otherwise.
"""

import torch
from torch import nn

from fathom.model import Decoder


def lay_out_for_decoding(model: Decoder) -> None:
    """Store tall float32 weights columns first, in place, where the model lies on a CPU.

    For models that are only read: training would go on from it, but not bitwise as without.
    """
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    if model.cfg.tie_embeddings:  # the embedding is the head
        weights.append(model.embed.weight)
    for weight in weights:
        rows, columns = weight.shape
        plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        if plain and rows > columns and weight.is_contiguous():
            weight.data = weight.data.t().contiguous().t()
