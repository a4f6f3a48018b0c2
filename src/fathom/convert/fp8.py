"""FP8 checkpoints as DeepSeek publishes them: E4M3 weights with one factor per 128 x 128 block.

``X.weight_scale_inv`` holds the factors that give the weights back: ``weight * weight_scale_inv``,
block by block, in float32; the last row and column of blocks may be cut. (The name says the
opposite of what it does.) Writing takes ``max(|block|) / 448``, for 448 is the largest E4M3 number.

Shapes: O rows, I columns, P and Q the numbers of blocks along them.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import Entry, TensorSource

BLOCK = 128
E4M3, LARGEST, SMALLEST_MAX = torch.float8_e4m3fn, 448.0, 1e-4
SCALE = "_scale_inv"
SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # the last: powers of two
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
QUANTISED = re.compile(
    r".*\.(self_attn|mlp)\.(.*\.)?"
    r"((q|k|v|o|q_a|q_b|kv_b|gate|up|down)_proj|kv_a_proj_with_mqa|indexer\.(wq_b|wk))\.weight"
)


def dequantise(weight_OI: Tensor, scale_PQ: Tensor) -> Tensor:
    """float32 weights from E4M3 ones."""
    wide_OI = weight_OI.float()
    for rows_OI, scale_Q in zip(wide_OI.split(BLOCK), scale_PQ, strict=True):
        rows_OI *= scale_Q.float().repeat_interleave(BLOCK)[: rows_OI.shape[1]]
    return wide_OI


def scales(weight_OI: Tensor) -> Tensor:
    """The float32 factor of every block, ``[P, Q]``."""
    rows = [
        torch.stack([block.abs().amax() for block in rows_OI.float().split(BLOCK, dim=1)])
        for rows_OI in weight_OI.split(BLOCK)
    ]
    return torch.stack(rows).clamp_min(SMALLEST_MAX) / LARGEST


def quantise(weight_OI: Tensor, scale_PQ: Tensor) -> Tensor:
    """E4M3 weights, of which :func:`dequantise` with the same scale makes nearly the old ones."""
    small_OI = torch.empty_like(weight_OI, dtype=E4M3)
    rows = zip(weight_OI.split(BLOCK), small_OI.split(BLOCK), scale_PQ, strict=True)
    for wide_OI, into_OI, scale_Q in rows:
        into_OI.copy_(wide_OI.float() / scale_Q.repeat_interleave(BLOCK)[: wide_OI.shape[1]])
    return small_OI


def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks cover a matrix."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_quantization(quantization: Any, source: str) -> None:
    """Refuse a ``quantization_config`` that is not this FP8.

    Raises:
        CheckpointError: which key, and what is followed here.
    """
    if quantization is None:
        return
    data = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    for key, allowed in (
        ("quant_method", ("fp8",)),
        ("fmt", ("e4m3", None)),
        ("weight_block_size", ([BLOCK, BLOCK],)),
        ("activation_scheme", ("dynamic", None)),
    ):
        if (value := data.get(key)) not in allowed:
            raise CheckpointError(
                f"{source} cannot be used: quantization_config.{key} is {str(value)!r:.80}, "
                f"and only FP8 (e4m3) in blocks of {BLOCK} x {BLOCK} is followed here"
            )


class Dequantised(TensorSource):
    """A source whose E4M3 weights are multiplied out when they are read.

    Raises:
        CheckpointError: an E4M3 tensor without its scale, or a scale of another shape.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        found = source.entries
        self._scaled = {name for name, entry in found.items() if entry.dtype == E4M3}
        self._entries = {
            name: self._entry(name, found) if name in self._scaled else entry
            for name, entry in found.items()
            if not name.endswith(SCALE) or name.removesuffix(SCALE) not in self._scaled
        }

    def _entry(self, name: str, found: Mapping[str, Entry]) -> Entry:
        weight, scale = found[name], found.get(name + SCALE)
        if scale is None:
            raise CheckpointError(f"the checkpoint lacks the tensor {name + SCALE!r}")
        fits = len(weight.shape) == 2 and scale.shape == blocks(weight.shape)
        if not fits or scale.dtype not in SCALES:
            raise CheckpointError(
                f"{name + SCALE!r} is {list(scale.shape)} of {scale.dtype}: a weight of "
                f"{list(weight.shape)} needs {list(blocks(weight.shape))} of float32"
            )
        return Entry(weight.shape, torch.float32, weight.num_bytes + scale.num_bytes)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        if name not in self._scaled:
            return tensor
        return dequantise(tensor, self._source.read(name + SCALE))

    def release(self, name: str) -> None:
        self._source.release(name)


class Quantised(TensorSource):
    """A source whose projections are stored as E4M3, as DeepSeek does: all but the router's."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._entries: dict[str, Entry] = {}
        for name, entry in source.entries.items():
            if not QUANTISED.fullmatch(name) or entry.dtype == E4M3:
                self._entries[name] = entry
                continue
            shape = entry.shape
            scale = blocks(shape)
            self._entries[name] = Entry(shape, E4M3, shape[0] * shape[1])
            self._entries[name + SCALE] = Entry(scale, torch.float32, 4 * scale[0] * scale[1])

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        if self._entries[name] == self._source.entries.get(name):
            return self._source.read(name)
        weight = self._source.read(name.removesuffix(SCALE))
        scale = scales(weight)
        return scale if name.endswith(SCALE) else quantise(weight, scale)

    def release(self, name: str) -> None:
        self._source.release(name.removesuffix(SCALE))
