"""A task: something to do that leaves one JSON file, written at once or not at all.

That file is what "finished" means, so a ladder that was stopped goes on by looking at which files
are there.
"""

import json
from pathlib import Path
from typing import Protocol

from fathom.settings import Data
from fathom.train.metrics import replace_text


class Task(Protocol):
    """What a worker can do. A task is a frozen dataclass: it travels to the worker by pickle."""

    @property
    def file(self) -> Path:
        """Where the result goes."""
        ...

    @property
    def arm(self) -> str:
        """Whose it is: tasks of one arm run the same compiled code."""
        ...

    @property
    def key(self) -> str:
        """Identifies what is done: a file with another key is of another study."""
        ...

    def run(self) -> Data:
        """Do it.

        Raises:
            KeyboardInterrupt: told to stop; it can go on later.
            Exception: it failed, which concerns no other task.
        """
        ...


def perform(task: Task) -> Data:
    """Do a task, write its file, and return what is in it."""
    result = {"key": task.key, **task.run()}
    write_json(task.file, result)
    return result


def finished(task: Task) -> Data | None:
    """What a finished task wrote, or None if it is still to be done."""
    data = read_object(task.file)
    return data if data is not None and data.get("key") == task.key else None


def read_object(path: Path) -> Data | None:
    """A JSON object, or None where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write_json(path: Path, data: Data) -> None:
    """A JSON file that is there whole or not at all. NaN is refused: it is not JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
