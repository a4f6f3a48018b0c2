"""The model: embed, blocks, norm, head, and multi-token prediction."""

import torch

from fathom.config import ModelConfig
from fathom.model.decoder import Decoder, Hidden, Losses
from fathom.model.init import init_weights

__all__ = ["Decoder", "Hidden", "Losses", "build_model"]


def build_model(
    cfg: ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A model with random weights, which depend on ``seed`` and the kind of device alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in its dtype at once: no second copy in float32
    try:
        with torch.device(device):
            model = Decoder(cfg)
    finally:
        torch.set_default_dtype(before)
    init_weights(model, cfg, seed)
    return model
