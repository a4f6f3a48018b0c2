"""Guard zones: every tensor that is allocated lies between sentinels, which must survive."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 4096  # bytes on each side
SENTINEL = 0x7F  # bytes that make a NaN in every floating dtype but float16, there a large number


class Guards(TorchDispatchMode):
    """Puts a zone of sentinels around each allocation, and fills the allocation with NaN.

    ``check()`` afterwards says whether something wrote outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zones: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket not in (
            torch.ops.aten.empty,
            torch.ops.aten.empty_like,
            torch.ops.aten.new_empty,
            torch.ops.aten.zeros_like,
        ):
            return made
        size = made.numel() * made.itemsize
        whole = torch.full((size + 2 * ZONE,), SENTINEL, dtype=torch.uint8, device=made.device)
        self.zones += [whole[:ZONE], whole[ZONE + size :]]
        guarded = whole[ZONE : ZONE + size].view(made.dtype).view(made.shape)
        return guarded.zero_() if func.overloadpacket is torch.ops.aten.zeros_like else guarded

    def check(self) -> None:
        assert self.zones
        assert all(bool((zone == SENTINEL).all()) for zone in self.zones)
