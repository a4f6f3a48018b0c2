"""Several processes for a test: forked, so that none imports torch again, and joined by gloo."""

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

TIMEOUT = timedelta(seconds=30)


def on_ranks(size: int, work: Callable[..., object], *args: Any) -> list[str]:
    """Run ``work(*args)`` on every rank; what each said when it failed, "" where it did not."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            ranks = [
                fork.Process(target=_rank, args=(rank, size, meeting, work, args))
                for rank in range(size)
            ]
            for process in ranks:
                process.start()
        for process in ranks:
            process.join()
        files = [meeting.with_name(f"{rank}") for rank in range(size)]
        return [file.read_text() if file.exists() else "it died" for file in files]


def _rank(rank: int, size: int, meeting: Path, work: Callable[..., object], args: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along with the fork
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    said = ""
    try:
        work(*args)
    except BaseException:
        said = traceback.format_exc()
    meeting.with_name(f"{rank}").write_text(said)
    dist.destroy_process_group()
