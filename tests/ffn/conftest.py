"""A built FFN with weights from its own generator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fathom.ffn import FFN, FFNConfig
from fathom.layers.step import Step

Build = Callable[..., FFN]


@pytest.fixture
def build() -> Build:
    """``build(cfg, dim, dtype=..., std=...)``."""

    def built(
        cfg: FFNConfig, dim: int, dtype: torch.dtype = torch.float64, std: float = 0.3
    ) -> FFN:
        module = cfg.build(dim)
        generator = torch.Generator().manual_seed(7)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        return module.to(dtype)

    return built


@pytest.fixture
def step() -> Step:
    """FFNs do not look at the step; any will do."""
    return Step.full(torch.zeros(1, 1, dtype=torch.int64))


@pytest.fixture
def inputs() -> Callable[..., Tensor]:
    """``inputs(batch, length, dim, dtype=...)``: standard normal."""

    def made(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return made
