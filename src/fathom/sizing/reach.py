"""How far RoPE tells positions apart.

Pair i of D/2 turns once in ``2 pi theta**(2i/D)`` tokens; the slowest in ``2 pi theta**((D-2)/D)``,
a little less than ``2 pi theta``. Its share of a score is ``cos(angle)``, the same at angles a and
``2 pi - a``, so alone it orders distances only up to half of that. A bound to compare with, not a
limit: the pairs together do not repeat there.
"""

import math
from typing import TypedDict

from fathom.attention import AttentionConfig, MHAConfig, MLAConfig, MoBAConfig, NSAConfig
from fathom.config import ModelConfig
from fathom.layers.position import DecoupledRopeConfig, RopeConfig


class Reach(TypedDict):
    """All lengths in tokens.

    ``scaled_*`` are those after the scaling (YaRN, ...) at the asked length; without one, the same.
    ``unfinished_pairs`` of ``pairs`` do not complete a turn within ``trained_len``.
    """

    theta: float
    longest_wavelength: float
    half_wavelength: float
    scaled_longest_wavelength: float
    scaled_half_wavelength: float
    pairs: int
    unfinished_pairs: int
    trained_len: int


def reach(cfg: ModelConfig, seq_len: int) -> Reach | None:
    """Of the lowest layer that has RoPE; None when no layer has."""
    for group in cfg.groups:
        rotated = rotation(group.attention)
        if rotated is not None:
            return _reach(*rotated, cfg.max_seq_len, seq_len)
    return None


def rotation(attention: AttentionConfig) -> tuple[RopeConfig, int] | None:
    """The RoPE of an attention and the number of channels that it turns."""
    match attention:
        case MLAConfig(position=position, qk_rope_head_dim=dim):
            return position, dim
        case MHAConfig(position=DecoupledRopeConfig() as position):
            return position, position.rope_head_dim
        case MHAConfig(position=RopeConfig() as position, head_dim=dim):
            return position, dim
        case MoBAConfig() | NSAConfig() as sparse if isinstance(sparse.position, RopeConfig):
            return sparse.position, sparse.head_dim
        case _:
            return None


def _reach(position: RopeConfig, dim: int, max_seq_len: int, seq_len: int) -> Reach:
    scaling = position.scaling
    trained_len = getattr(scaling, "original_seq_len", max_seq_len)
    wavelengths = [2 * math.pi * position.theta ** (2 * i / dim) for i in range(dim // 2)]
    scaled = wavelengths[-1]
    if scaling is not None:
        scaled = 2 * math.pi / float(position.rope(dim).frequencies(seq_len).min())
    return Reach(
        theta=position.theta,
        longest_wavelength=wavelengths[-1],
        half_wavelength=wavelengths[-1] / 2,
        scaled_longest_wavelength=scaled,
        scaled_half_wavelength=scaled / 2,
        pairs=dim // 2,
        unfinished_pairs=sum(wavelength > trained_len for wavelength in wavelengths),
        trained_len=trained_len,
    )
