"""Saving while training goes on: from a copy that no later step can touch, one save at a time."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fathom.convert.parts import Part
from fathom.convert.ranks import Ranks
from fathom.train.checkpoint import Snapshot, Tensors, save


class Saver:
    """Commits a run's checkpoints in order.

    Args:
        run: its folder.
        background: return as soon as a stable copy lies in host memory, and write that in a thread.
        ranks: those that save together; for background saves their group is used by nothing else.
    """

    def __init__(self, run: Path, *, background: bool, ranks: Ranks | None = None) -> None:
        self.run, self.background, self.ranks = run, background, ranks
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}  # kept: allocating costs more than copying

    def start(self, taken: Snapshot) -> None:
        """Save; the one before has been :meth:`ended`."""
        assert self._writing is None
        if self.background:
            taken = self._stable(taken)
        self._writing = self._pool.submit(save, self.run, taken, self.ranks)
        if not self.background:
            wait([self._writing])

    def ended(self, *, waiting: bool = False) -> Path | None:
        """The checkpoint that was under way, once it is committed; None if there is none.

        Raises:
            OSError: it could not be saved.
        """
        if self._writing is None or not (waiting or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def close(self) -> None:
        """Wait for the save that is under way, whatever becomes of it."""
        self._pool.shutdown()

    def _stable(self, taken: Snapshot) -> Snapshot:
        """The same with tensors of its own, in host memory; returns when the copy is whole."""
        copied = {
            "model": self._copied("model", taken.model),
            "optimizer": self._copied("optimizer", taken.optimizer),
        }
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return replace(taken, **copied)

    def _copied(self, kind: str, tensors: Mapping[str, Tensor | Part]) -> Tensors:
        return {name: self._copy(f"{kind}/{name}", item) for name, item in tensors.items()}

    def _copy(self, key: str, item: Tensor | Part) -> Tensor | Part:
        if isinstance(item, Part):
            return replace(item, tensor=self._host_copy(key, item.tensor))
        return self._host_copy(key, item)

    def _host_copy(self, key: str, tensor: Tensor) -> Tensor:
        if key not in self._copies:
            self._copies[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[key].copy_(tensor.detach(), non_blocking=True)
