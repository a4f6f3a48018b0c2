"""Our own checkpoints: folders that are there whole or not at all, and are checked before use.

A checkpoint is written beside its final name, every file and folder synced, a manifest of sizes and
hashes written last, and then renamed: the rename is the commit. Which one is the latest is derived
from the names, never stored. Nothing in a checkpoint is executed: tensors are safetensors, all else
JSON and TOML. Equal state gives equal bytes: no time, host or folder name is inside.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fathom.config import ModelConfig
from fathom.convert.parts import (
    CheckpointError,
    check_whole,
    copy_tensors,
    opened,
    part_path,
    tensor_shapes,
    write_tensors,
)
from fathom.convert.ranks import Ranks
from fathom.data.shards import sync
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder, uninitialised
from fathom.settings import ConfigError, parse, read_toml, to_data

FORMAT = 1
CHECKPOINTS = "checkpoints"
MANIFEST, CONFIG, TOKENIZER = "MANIFEST.json", "config.toml", "tokenizer.json"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MAX_JSON_BYTES = 64 * 2**20
COMMITTED = re.compile(r"step-(\d{8,12})")
TEMPORARY = re.compile(r"step-\d{8,12}\.tmp-[0-9a-f]{32}")


# --- Writing ---------------------------------------------------------------------------------


@contextmanager
def new_checkpoint(final: Path, ranks: Ranks | None = None) -> Iterator[Path]:
    """A temporary sibling to write files into; it becomes ``final`` when the block ends well.

    A folder already at ``final`` is replaced. If the block fails, nothing is left of it. Of
    several ranks each writes files of its own, on a filesystem that they share; if one fails, all
    do, and the rename that commits is rank 0's.

    Raises:
        OSError: the disk, or another rank, has failed.
    """
    ranks = ranks or Ranks()
    with new_folder(final, ranks) as folder:
        with ranks.together(f"save its part of {final}"):
            yield folder
            seal_own(folder, ranks)
        if ranks.rank == 0:
            seal(folder, ranks)


@contextmanager
def new_folder(final: Path, ranks: Ranks | None = None) -> Iterator[Path]:
    """The same for a folder that is no checkpoint of ours: no manifest is added."""
    ranks = ranks or Ranks()
    folder = _temporary(final, ranks.from_first(uuid.uuid4().bytes).hex())
    try:
        with ranks.together(f"make {folder}"):
            if ranks.rank == 0:
                final.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
        with ranks.together(f"write {final}"):
            yield folder
            if ranks.rank == 0:
                commit(folder, final)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def seal_own(folder: Path, ranks: Ranks) -> None:
    """Of a rank but the first: sync its files, and leave a list of them for rank 0."""
    if ranks.rank > 0:
        mine = [path for path in folder.iterdir() if _rank_of(path.name) == ranks.rank]
        write_json(part_path(folder / MANIFEST, ranks.rank), _synced(mine))


def seal(folder: Path, ranks: Ranks | None = None) -> None:
    """Sync every file, and write the manifest that lists them with sizes and hashes.

    Of several ranks the first does it, when the others have sealed their own: while they write,
    there may be files of theirs that are about to be renamed.
    """
    size = 1 if ranks is None else ranks.size
    files = _synced([p for p in folder.iterdir() if p.name != MANIFEST and not _rank_of(p.name)])
    for path in (part_path(folder / MANIFEST, rank) for rank in range(1, size)):
        files |= read_json(path)
        path.unlink()
    for path in folder.glob("*.rank-00000.safetensors"):
        check_whole(path.with_name(path.name.replace(".rank-00000", "")))
    write_json(folder / MANIFEST, {"format": FORMAT, "world": size, "files": files})
    sync(folder / MANIFEST)
    sync(folder)


def _synced(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Wait until files are on the disk; the manifest's entries for them."""
    files = {}
    for path in sorted(paths):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def _rank_of(name: str) -> int:
    """The rank that writes a file: the one in its name, else 0."""
    found = re.search(r"\.rank-(\d{5})\.", name)
    return int(found[1]) if found else 0


def commit(folder: Path, final: Path) -> None:
    """Rename a sealed folder into place and sync the parent."""
    if final.exists():
        remove(final)
    os.rename(folder, final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint, which has lost its name before its first file goes."""
    nameless = _temporary(folder)
    os.rename(folder, nameless)
    shutil.rmtree(nameless)


def _temporary(final: Path, unique: str | None = None) -> Path:
    return final.with_name(f"{final.name}.tmp-{unique or uuid.uuid4().hex}")


def sweep(run: Path) -> None:
    """Remove what interrupted saves left of a run: our own temporary names only."""
    folder = run / CHECKPOINTS
    for path in folder.iterdir() if folder.is_dir() else ():
        if TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def prune(run: Path, keep: int, every: int = 0, *, needed_before: int | None = None) -> None:
    """Remove all but the ``keep`` newest checkpoints of a run, and those of every so many steps.

    Args:
        needed_before: the newest one before this step stays too: the run may return to it.
    """
    assert keep >= 2
    folders = committed(run)
    needed = [f for f in folders if needed_before is not None and step_of(f) < needed_before]
    for folder in folders[:-keep]:
        if folder not in needed[-1:] and (not every or step_of(folder) % every):
            remove(folder)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON that is equal for equal data. ``NaN`` is refused: it is not JSON."""
    path.write_text(_json(data), encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def save_model(model: Decoder, tokenizer: Tokenizer, out: Path, *, force: bool = False) -> None:
    """Write a model as a folder that ``load_model`` reads.

    Args:
        force: replace the checkpoint at ``out``.

    Raises:
        ValueError: ``out`` is there already.
    """
    require_free(out, force=force)
    with new_checkpoint(out) as folder:
        config = tomli_w.dumps({"model": to_data(model.cfg)})
        write_model(folder, model, tokenizer, config)


def require_free(out: Path, *, force: bool) -> None:
    """Refuse to write where something is, but for a checkpoint that may be replaced.

    Raises:
        ConfigError: ``out`` is there already, or is no checkpoint.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise ConfigError(f"{out} is there already: name another folder, or give --force")
    names = set(os.listdir(out)) if out.is_dir() and not out.is_symlink() else {"a file"}
    if names and not names & {CONFIG, "config.json"}:
        raise ConfigError(f"{out} is no checkpoint, so it is not replaced: name another folder")


def write_model(folder: Path, model: Decoder, tokenizer: Tokenizer, config: str) -> None:
    """The files that make a folder a model: weights, tokenizer, config."""
    write_tensors(folder / MODEL, model.state_dict())
    write_texts(folder, tokenizer, config)


def write_texts(folder: Path, tokenizer: Tokenizer, config: str) -> None:
    """The files beside the weights: tokenizer, config."""
    (folder / TOKENIZER).write_bytes(tokenizer.to_bytes())
    (folder / CONFIG).write_text(config, encoding="utf-8")


# --- Finding and checking --------------------------------------------------------------------


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run's checkpoint after ``step`` steps lies."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def committed(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((folder / name for name in names if COMMITTED.fullmatch(name)), key=step_of)


def newest(
    run: Path, *, hashes: bool = True, before: int | None = None, warn: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint of a run that is whole; None if the run has none yet.

    Args:
        before: consider those of earlier steps only.
        warn: told of each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    folders = [f for f in committed(run) if before is None or step_of(f) < before]
    problem = ""
    for folder in reversed(folders):
        try:
            verify(folder, hashes=hashes)
            return folder
        except CheckpointError as error:
            problem = str(error)
            warn(f"{error}: going back to the checkpoint before it")
    if folders:
        raise CheckpointError(f"no checkpoint of {run} can be used; the oldest: {problem}")
    return None


def verify(folder: Path, *, hashes: bool = True) -> None:
    """Check a checkpoint's files against its manifest: sizes always, hashes unless told not to.

    Raises:
        CheckpointError: what is wrong, and with which file.
    """
    for name, entry in _manifest(folder).items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, "
                f"not {entry['bytes']}"
            )
        if hashes and sha256(path) != entry["sha256"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} has changed")


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT}"
            )
        files, world = manifest["files"], manifest["world"]
        if type(world) is not int or world < 1:
            raise CheckpointError(f"{path} is damaged: no {world} processes wrote it")
        for name in [TOKENIZER, CONFIG, *_model_files(world, most=len(files))]:
            if name not in files:
                raise CheckpointError(f"{path} is damaged: it lists no {name}")
        for name, entry in files.items():
            plain = name == Path(name).name and type(entry["bytes"]) is int
            if not plain or not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
                raise CheckpointError(f"{path} is damaged at {name!r}")
        if path.read_bytes() != _json(manifest).encode():
            raise CheckpointError(f"{path} is damaged: not every byte is as it was written")
        return files
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged: it is not a manifest") from None


def _model_files(world: int, most: int) -> list[str]:
    if world == 1:
        return [MODEL]
    return [part_path(Path(MODEL), rank).name for rank in range(min(world, most))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES // 2**20} MB")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return data


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Reading ---------------------------------------------------------------------------------


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    hashes: bool = True,
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a run folder (its newest whole checkpoint) or of one checkpoint.

    Args:
        dtype: of the weights; None: as they are stored.
        hashes: check the files' hashes before use.
        warn: told of a damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there is none, or what there is cannot be used.
    """
    folder = find_checkpoint(path, hashes=hashes, warn=warn)
    cfg, tokenizer = read_model_config(folder), read_tokenizer(folder)
    shapes = tensor_shapes(folder / MODEL)
    check_shapes(cfg, shapes, folder)
    stored = getattr(torch, _stored_dtype(folder / MODEL))
    model = uninitialised(cfg, torch.device(device), dtype or stored)
    copy_tensors(folder / MODEL, model.state_dict())
    return model, tokenizer


def find_checkpoint(
    path: Path, *, hashes: bool = True, warn: Callable[[str], None] = lambda _: None
) -> Path:
    """The checked checkpoint that ``path`` means: itself, or a run folder's newest whole one."""
    if (path / MANIFEST).is_file():
        verify(path, hashes=hashes)
        return path
    folder = newest(path, hashes=hashes, warn=warn)
    if folder is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run folder with one: it has no {MANIFEST}"
        )
    return folder


def read_model_config(folder: Path) -> ModelConfig:
    """The model's part of a checkpoint's config."""
    try:
        return parse(ModelConfig, read_toml(folder / CONFIG).get("model", {}))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {error}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder / TOKENIZER)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def check_shapes(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Compare a file's tensors with those that a config needs, before any memory is taken.

    Raises:
        CheckpointError: the first tensor that is missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        needed = {name: tuple(t.shape) for name, t in Decoder(cfg).state_dict().items()}
    for name in sorted(needed.keys() | shapes.keys()):
        if needed.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{source} does not fit the model: {name} is {_shape(shapes.get(name))} there, "
                f"and the model's is {_shape(needed.get(name))}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _stored_dtype(path: Path) -> str:
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with opened(path) as stored:
        return names[stored.dtype("embed.weight")]
