"""Another project's checkpoint into a model, tensor by tensor, each into its place.

A model is made in its final type on its final device and filled in parallel. Beside it only the
tensors in flight exist, so the peak is the model itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fathom.convert.checkpoint import Checkpoint, check, open_checkpoint
from fathom.convert.fp8 import E4M3, Dequantised
from fathom.convert.gguf import is_gguf, open_gguf
from fathom.convert.hf_tokenizer import read_hf_tokenizer
from fathom.convert.rules import Copy, Rule, filled_by
from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import Entry, Progress, TensorSource
from fathom.data.tokenizer import Tokenizer
from fathom.model import Decoder, uninitialised

THREADS = 4
RUN_BYTES = 8 * 2**20


def load_foreign(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """The model of another project's checkpoint; ``model.origin`` keeps what came beside it.

    ``model.tokenizer`` is its tokenizer, where it is one of those that this version reads; else
    None, and ``model.no_tokenizer`` says why.

    Args:
        dtype: of the weights; None: as stored, and bfloat16 where they are FP8.
        progress: told of the bytes read so far.

    Raises:
        CheckpointError: what cannot be used, by file, key or tensor.
    """
    checkpoint = open_gguf(path) if is_gguf(path) else open_checkpoint(path)
    model = fill(checkpoint, device=device, dtype=dtype, progress=progress)
    tokenizer, reason = read_tokenizer(checkpoint)
    for name, value in (("origin", checkpoint.origin), ("tokenizer", tokenizer)):
        object.__setattr__(model, name, value)  # nn.Module types its own setter narrowly
    object.__setattr__(model, "no_tokenizer", reason)
    return model


def read_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer | None, str]:
    """The checkpoint's tokenizer; or None, and why: a model without one still takes ids."""
    try:
        return read_hf_tokenizer(checkpoint.origin.files, f"{checkpoint.path}"), ""
    except CheckpointError as error:
        return None, str(error)


def fill(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """A model with the weights of an opened checkpoint, after :func:`check`."""
    needed = check(checkpoint)
    source = Dequantised(checkpoint.source)
    stored = checkpoint.source.entries
    if dtype is None:
        dtype = next(stored[n].dtype for n, (rule, _) in needed.items() if rule.ours == EMBEDDING)
    model = uninitialised(checkpoint.cfg, torch.device(device), dtype)
    parts = filled_by(checkpoint.rules, model.state_dict())
    fp8 = any(entry.dtype == E4M3 for entry in stored.values())
    stage = f"loading {checkpoint.path.name}" + (", FP8 multiplied out," if fp8 else "")
    copy_parts(source, parts, lambda done, all_: progress and progress(stage, done, all_))
    return model


EMBEDDING = "embed.weight"


def copy_parts(
    source: TensorSource,
    parts: Mapping[str, tuple[Rule, Tensor]],
    progress: Callable[[int, int], object],
) -> None:
    """Copy every tensor of a source into the part that its rule names, several at once.

    Raises:
        CheckpointError: a second copy of a tensor is not equal to the first.
    """
    entries = source.entries
    names = [name for name in entries if name in parts]
    total = sum(entries[name].num_bytes for name in names)
    first = [name for name in names if type(parts[name][0]) is not Copy]
    second = [name for name in names if type(parts[name][0]) is Copy]

    def copy(run: Sequence[str]) -> int:
        for name in run:
            rule, part = parts[name]
            tensor = rule.load(source.read(name))
            if type(rule) is Copy:
                _require_equal(name, tensor, rule.ours, part)
            else:
                with torch.inference_mode(part.is_inference()):  # a thread has not its caller's
                    part.copy_(tensor)
            source.release(name)
        return sum(entries[name].num_bytes for name in run)

    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for group in (first, second):
            for num_bytes in pool.map(copy, runs(group, entries)):
                done += num_bytes
                progress(done, total)


def runs(names: Sequence[str], entries: Mapping[str, Entry]) -> Iterator[Sequence[str]]:
    """The names in runs of about ``RUN_BYTES``, each the work of one thread."""
    run: list[str] = []
    held = 0
    for name in names:
        run.append(name)
        held += entries[name].num_bytes
        if held >= RUN_BYTES:
            yield run
            run, held = [], 0
    if run:
        yield run


def _require_equal(name: str, copy: Tensor, ours: str, part: Tensor) -> None:
    if not torch.equal(copy.to(part.device, part.dtype), part):
        raise CheckpointError(
            f"{name!r} differs from the model's own {ours}, of which it should be a copy: one "
            "tensor serves both here"
        )
