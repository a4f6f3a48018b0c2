"""Processes that save without pause, alone or several together, until they are killed."""

import os
import signal
import struct
import time
import uuid
from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from fathom.chaos.children import KILLED, Child
from fathom.convert.parts import Part, cut
from fathom.convert.ranks import Ranks
from fathom.train.checkpoint import Snapshot, Tensors, save

LEAVE_SECONDS = 30.0  # within which the others must have left when one has died


class Writers:
    """They save a run's checkpoint again and again, under ever higher steps.

    Args:
        run: its folder, which is there.
        taken: what is saved; of several ranks each saves its rows of every tensor.
        first: the first step.
        ranks: how many save together.
    """

    def __init__(self, run: Path, taken: Snapshot, first: int, ranks: int = 1) -> None:
        self._reader, to = os.pipe()
        self._meeting = run / f".meeting-{uuid.uuid4().hex}"
        self.known = first - 1
        self.ranks = [
            Child(lambda rank=rank: self._save(run, taken, first, to, rank, ranks))
            for rank in range(ranks)
        ]
        os.close(to)

    def _save(self, run: Path, taken: Snapshot, step: int, to: int, rank: int, size: int) -> int:
        """A writer's work, which never ends well."""
        together = Ranks() if size == 1 else _joined(self._meeting, rank, size)
        mine = replace(
            taken,
            model=_share(taken.model, rank, size),
            optimizer=_share(taken.optimizer, rank, size),
        )
        while True:
            if rank == 0:
                os.write(to, struct.pack("q", step - 1))
            save(run, replace(mine, step=step, state={**taken.state, "step": step}), together)
            step += 1

    def wait(self) -> float:
        """Until they have begun, or have committed the next; the seconds that it took."""
        begun = time.perf_counter()
        self._hear(os.read(self._reader, 8))
        return time.perf_counter() - begun

    def kill(self, victims: Collection[int]) -> str | None:
        """Kill the ranks of these numbers at once; what is wrong about the end of any, or None.

        One of several that are killed may have left before its turn came, as the others must.
        """
        for rank in victims:
            self.ranks[rank].send(signal.SIGKILL)
        problems = []
        for rank, child in enumerate(self.ranks):
            code = child.wait_at_most(LEAVE_SECONDS)
            if code is None:
                child.kill_after(0)
                problems.append(f"rank {rank} stayed when rank {min(victims)} had died")
            elif code == 0 or (code == KILLED and rank not in victims):
                problems.append(f"rank {rank} ended with exit code {code}")
        self._hear(_rest(self._reader))
        self._meeting.unlink(missing_ok=True)
        return problems[0] if problems else None

    def _hear(self, content: bytes) -> None:
        """Learn of the steps that are committed; a torn last number is none."""
        for (step,) in struct.iter_unpack("q", content[: len(content) // 8 * 8]):
            self.known = step


def _rest(reader: int) -> bytes:
    """What is left in a pipe whose writers are gone."""
    with os.fdopen(reader, "rb") as file:
        return file.read()


def _joined(meeting: Path, rank: int, size: int) -> Ranks:
    torch.set_num_threads(1)  # OpenMP's threads do not come along with a fork
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LEAVE_SECONDS),
    )
    assert dist.group.WORLD is not None
    ranks = Ranks(dist.group.WORLD)
    ranks.gather(0)  # one that still looks for the others would look for the dead, too
    return ranks


def _share(tensors: Tensors, rank: int, size: int) -> Tensors:
    """The rows of one rank of several; of what has no rows, and of one rank, all."""
    return {name: _rows(item, rank, size) for name, item in tensors.items()}


def _rows(item: torch.Tensor | Part, rank: int, size: int) -> torch.Tensor | Part:
    if size == 1 or isinstance(item, Part) or item.ndim == 0:
        return item
    rows = item.chunk(size)
    mine = rows[rank] if rank < len(rows) else item[:0]
    return cut(mine, dim=0, index=rank, parts=size, size=len(item))
