"""The model: embed, blocks, norm, head, and multi-token prediction."""

import torch

from fathom.config import ModelConfig
from fathom.model.decoder import Decoder, Hidden, Losses
from fathom.model.init import init_weights

__all__ = ["Decoder", "Hidden", "Losses", "build_model", "uninitialised"]


def build_model(
    cfg: ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A model with random weights, which depend on ``seed`` and the kind of device alone."""
    model = uninitialised(cfg, torch.device(device), dtype)
    init_weights(model, cfg, seed)
    return model


def uninitialised(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A model whose weights are whatever was in memory, to be filled."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in its dtype at once: no second copy in float32
    try:
        with device:
            return Decoder(cfg)
    finally:
        torch.set_default_dtype(before)
