"""Rotary position embedding (RoPE, arXiv:2104.09864) and its scalings.

Pair ``i`` of ``D/2`` turns by ``position * theta**(-2i/D)``: a score depends on the distance of
query and key alone. Pairs are half-split: channels ``i`` and ``i + D/2``; checkpoints with adjacent
pairs are permuted when they are read. The slowest pair turns once in ``2 pi theta**((D-2)/D)``.

Scalings stretch a trained context: ``linear`` (position interpolation), ``dynamic`` (NTK, theta
grows with the sequence), ``llama3`` (by wavelength), ``yarn`` (arXiv:2309.00071, by turns).

Shapes: B batch, T tokens, H heads, D rotated width, R = D / 2 pairs.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Discriminator
from torch import Tensor, nn

from fathom.layers.base import Config, require


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(Config):
    """Base of the scalings."""

    factor: float

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"scaling.factor must be at least 1, got {self.factor}")

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """What MLA multiplies its softmax scale by (DeepSeek's correction; 1 elsewhere)."""
        return 1.0

    def scale(self, inv_freq_R: Tensor, theta: float, total: int) -> Tensor:
        """The scaled frequencies for ``total`` positions in use."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LinearScaling(ScalingConfig):
    """Position interpolation: every frequency divided by ``factor``."""

    kind: Literal["linear"] = "linear"

    def scale(self, inv_freq_R: Tensor, theta: float, total: int) -> Tensor:
        return inv_freq_R / self.factor


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(ScalingConfig):
    """Dynamic NTK: theta grows once a sequence passes ``original_seq_len``."""

    kind: Literal["dynamic"] = "dynamic"
    original_seq_len: int

    def scale(self, inv_freq_R: Tensor, theta: float, total: int) -> Tensor:
        dim = 2 * inv_freq_R.shape[0]
        stretch = self.factor * max(total, self.original_seq_len) / self.original_seq_len
        grown = theta * (stretch - (self.factor - 1)) ** (dim / (dim - 2))
        return inverse_frequencies(dim, grown, inv_freq_R.device)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(ScalingConfig):
    """Llama 3.1: long waves divided by ``factor``, short ones kept, a blend between."""

    kind: Literal["llama3"] = "llama3"
    original_seq_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"scaling.high_freq_factor must be above low_freq_factor, got {self.high_freq_factor} "
            f"and {self.low_freq_factor}: the blend between them would be empty",
        )

    def scale(self, inv_freq_R: Tensor, theta: float, total: int) -> Tensor:
        turns = self.original_seq_len * inv_freq_R / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return inv_freq_R * ((1 - kept) / self.factor + kept)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(ScalingConfig):
    """YaRN: pairs of more than ``beta_fast`` turns are kept, of fewer than ``beta_slow`` divided.

    ``mscale`` and ``mscale_all_dim`` are DeepSeek's: their ratio goes on cos and sin, and
    ``mscale_all_dim`` squared on the softmax scale of MLA.
    """

    kind: Literal["yarn"] = "yarn"
    original_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    explicit_attention_factor: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        if self.explicit_attention_factor is not None:
            return self.explicit_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def softmax_factor(self) -> float:
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def scale(self, inv_freq_R: Tensor, theta: float, total: int) -> Tensor:
        low, high = self.correction_range(2 * inv_freq_R.shape[0], theta)
        pairs = torch.arange(inv_freq_R.shape[0], dtype=torch.float32, device=inv_freq_R.device)
        ramp = ((pairs - low) / (high - low)).clamp(0, 1)
        return inv_freq_R / self.factor * ramp + inv_freq_R * (1 - ramp)

    def correction_range(self, dim: int, theta: float) -> tuple[float, float]:
        """First and last pair of the blend, by the number of turns in the original context."""

        def pair(turns: float) -> float:
            wavelengths = math.log(self.original_seq_len / (2 * math.pi * turns))
            return dim * wavelengths / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if low == high else high


AnyScaling = Annotated[
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling, Discriminator("kind")
]


def inverse_frequencies(dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """``theta**(-2i/dim)`` for each pair, float32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    return 1.0 / theta**exponents


class Rope(nn.Module):
    """Rotates the last ``dim`` channels of queries and keys. No parameters.

    Args:
        dim: rotated channels per head, even.
        theta: the base.
        scaling: how a trained context is stretched, or None.
    """

    def __init__(self, dim: int, theta: float, scaling: ScalingConfig | None = None) -> None:
        super().__init__()
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self.name = f"angles of {dim}, {theta}, {scaling}"  # equal for equal rotations

    def frequencies(self, total: int, device: torch.device | str | None = None) -> Tensor:
        """Radians per position of each pair, float32 ``[R]``, for ``total`` positions in use."""
        inv_freq_R = inverse_frequencies(self.dim, self.theta, device)
        if self.scaling is None:
            return inv_freq_R
        return self.scaling.scale(inv_freq_R, self.theta, total)

    def angles(self, positions_BT: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """cos and sin, ``[B, T, 1, R]`` float32, the scaling's attention factor included."""
        inv_freq_R = self.frequencies(total, positions_BT.device)
        angle = (positions_BT[..., None].float() * inv_freq_R)[:, :, None, :]
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        return angle.cos() * factor, angle.sin() * factor
