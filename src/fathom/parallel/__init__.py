"""Many processes, the numbers of one: the mesh, experts on several ranks, sharded state."""

from collections.abc import Callable

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.convert.parts import Part
from fathom.model import Decoder, build_model
from fathom.parallel.mesh import ALONE, Layout, started

__all__ = ["ALONE", "Layout", "build", "places", "started"]


def build(
    cfg: ModelConfig, layout: Layout, *, seed: int, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """This process's part of a model with random weights, the same in every layout."""
    if layout.world == 1:
        return build_model(cfg, seed=seed, device=device, dtype=dtype)
    from fathom.parallel.shard import build_part  # with it comes FSDP2, which takes a second

    return build_part(cfg, layout, seed=seed, device=device, dtype=dtype)


def places(model: Decoder, layout: Layout) -> Callable[[str, Tensor], Part] | None:
    """Where the parts of this process lie in the tensors of a checkpoint; None: it has all."""
    if layout.world == 1:
        return None
    from fathom.parallel.shard import placing

    return placing(model, layout)
