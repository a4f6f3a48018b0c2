"""One tensor of a GGUF file that is to be written: its name, and what it is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["F16", "Q8_0"]


@dataclass(frozen=True)
class Item:
    """A tensor to write.

    Args:
        name: in the file.
        shape: rows first.
        sources: names of the tensors that it is made of.
        make: of these, in that order.
        wide: float32 whatever the others are; vectors always are.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor]
    wide: bool = False

    def form(self, kind: Kind) -> str:
        """The type it is written in: Q8_0 wants rows of whole blocks."""
        if self.wide or len(self.shape) == 1:
            return "F32"
        return kind if kind == "F16" or self.shape[-1] % 32 == 0 else "F16"
