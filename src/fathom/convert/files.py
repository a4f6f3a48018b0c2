"""The one door to the files of a stranger's folder: inside it, regular, no links, of bounded size.

A link is refused, for it may point anywhere. One layout of links is known: the Hugging Face hub's
cache, where ``models--*/snapshots/<revision>/<name>`` points to ``models--*/blobs/<hash>``.
"""

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from fathom.convert.run_folder import CheckpointError

MAX_JSON_BYTES = 2**20  # config.json and its like


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open the regular file ``name`` of a folder for reading.

    Raises:
        CheckpointError: no plain name, absent, a link, or no regular file.
    """
    if not is_plain(name):
        raise CheckpointError(f"{folder} names a file {name!r}: only names inside it are read")
    path = _behind_hub_link(folder / name)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(
                f"{folder / name} is a link: give a folder that holds the file itself"
            ) from None
        raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{folder / name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def is_plain(name: str) -> bool:
    """Whether a name is one file's, inside the folder that names it."""
    return (
        0 < len(name) <= 255
        and name.isprintable()
        and not set(name) & {"/", "\\", ":"}
        and (name not in (".", ".."))
    )


def _behind_hub_link(path: Path) -> Path:
    """The blob that a link of the hub's cache means; any other path as it is."""
    if not path.is_symlink():
        return path
    revision = path.parent.resolve()
    model = revision.parent.parent
    target = revision / os.readlink(path)
    blob = Path(os.path.normpath(target))
    in_cache = revision.parent.name == "snapshots" and model.name.startswith("models--")
    blobs = model / "blobs"
    return blob if in_cache and blob.parent == blobs and not blobs.is_symlink() else path


def exists(folder: Path, name: str) -> bool:
    """Whether the folder has anything of that name, readable or not."""
    return os.path.lexists(folder / name)


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes.

    Raises:
        CheckpointError: it cannot be opened (:func:`open_inside`), or is larger.
    """
    with open_inside(folder, name) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{folder / name} is larger than {limit:,} bytes")
    return content


def read_object(folder: Path, name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object, or names a key twice.
    """
    return parse_object(read_bytes(folder, name, limit), f"{folder / name}")


def parse_object(content: bytes, source: str) -> dict[str, Any]:
    """A JSON object; a key that stands twice would mean two things, and is refused."""
    try:
        data = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _UnusableError) else "it is not JSON"
        raise CheckpointError(f"{source} cannot be used: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} cannot be used: it is not a JSON object")
    return data


class _UnusableError(ValueError):
    """JSON that Python reads, but that is not used here."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _UnusableError(f"it names {twice[:80]!r} twice")
    return found


def _no_constant(text: str) -> None:
    raise _UnusableError(f"{text} is no number of JSON")
