"""What the processes of one run must agree on to save together. One alone agrees with itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist


class Ranks:
    """The processes that save one checkpoint.

    Args:
        group: theirs alone, on the CPU (gloo), with a timeout: a save that is on its way in a
            thread must not meet other messages. None: one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, number: int) -> list[int]:
        """Every rank's number, in the order of ranks, on every rank."""
        if self.group is None:
            return [number]
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor([int(number)]), group=self.group)
        return [int(item) for item in found]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather(flag))

    def from_first(self, text: bytes) -> bytes:
        """Rank 0's bytes, on every rank, whose own are as many."""
        if self.group is None:
            return text
        tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor.numpy().tobytes()

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Work of every rank, after which either all go on or all raise.

        Raises:
            OSError: another rank could not do it; its number.
        """
        error = None
        try:
            yield
        except BaseException as caught:  # raised again once the others know
            error = caught
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if error is not None:
            raise error
        if failed:
            raise OSError(f"rank {failed[0]} could not {doing}: see what it says")
