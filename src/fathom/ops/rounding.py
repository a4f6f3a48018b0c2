"""Updates too small for bfloat16: rounded up or down by chance, or kept in 16 bits more.

A bfloat16 number is the upper half of a float32 number. Half of the steps between two neighbours
are lost if an update is added and rounded to the nearest. Chance in proportion to what lies beyond
(Gupta et al., arXiv:1502.02551) keeps the sum right on average, and the lower half keeps it right.

Chance is Philox 4x32-10 (Salmon et al., SC 2011): a function of a seed and a counter, so that a
step which is done again rounds alike, wherever it is done.
"""

import torch
from torch import Tensor

MASK = 2**32 - 1
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
NAN = 0x7FC00000  # the float32 that stays one whatever 16 bits are added to it
PER_COUNTER = 8  # 16-bit numbers


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that bfloat16 ``high`` is nearest to; ``low``, int16, is the rest."""
    return ((high.view(torch.int16).int() << 16) + low).view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The other way: ``(high, low)`` of float32 numbers."""
    bits = _bits(x)
    high = (bits + 0x8000) >> 16
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


def rounded(x: Tensor, chance: Tensor) -> Tensor:
    """float32 numbers as bfloat16: upwards in magnitude with the probability of what is cut off.

    Args:
        chance: of x's shape, integers from 0 to 2**16 - 1.
    """
    return ((_bits(x) + chance.int()) >> 16).short().view(torch.bfloat16)


def _bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), NAN, x.contiguous().view(torch.int32))


def chances(count: int, seed: int, number: int, step: Tensor) -> Tensor:
    """``[count]`` 16-bit random numbers, int64, of parameter ``number`` in ``step`` (a scalar)."""
    first = torch.arange(-(-count // PER_COUNTER), device=step.device) & MASK
    rest = torch.zeros_like(first)
    words = philox((first, rest + number, rest + step.long(), rest), seed)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[:count]


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Four random words of each counter of four words; words are int64 from 0 to 2**32 - 1."""
    a, b, c, d = counter
    keys = [seed & MASK, seed >> 32 & MASK]
    for _ in range(10):
        ac, bd = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, of which none are lost
        a, c = _upper(bd) ^ b ^ keys[0], _upper(ac) ^ d ^ keys[1]
        b, d = bd & MASK, ac & MASK
        keys = [(key + step) & MASK for key, step in zip(keys, KEY_STEPS, strict=True)]
    return a, b, c, d


def _upper(product: Tensor) -> Tensor:
    return product >> 32 & MASK
