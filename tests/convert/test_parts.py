"""Tensors in parts: every layout is written, and read back as every other; all ranks or none."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fathom.convert.parts import (
    CheckpointError,
    Part,
    check_whole,
    copy_tensors,
    cut,
    opened,
    part_path,
    tensor_shapes,
    whole,
    write_tensors,
)
from fathom.convert.ranks import Ranks
from fathom.convert.run_folder import CONFIG, MODEL, TOKENIZER, new_checkpoint, seal_own, verify
from ranks import on_ranks

WHOLE = {
    "cut.rows": torch.arange(7 * 3, dtype=torch.float32).view(7, 3),
    "cut.columns": torch.arange(2 * 5, dtype=torch.bfloat16).view(2, 5),
    "kept": torch.arange(3, dtype=torch.int64),
    "scalar": torch.tensor(5.0),
}


def layout(rank: int, ranks: int) -> dict[str, Part]:
    """Rows and columns cut as ``torch.chunk`` does, the rest on every rank, the last one writes."""
    found: dict[str, Part] = {}
    for name, tensor in WHOLE.items():
        if not name.startswith("cut"):
            found[name] = whole(tensor.clone(), write=rank == ranks - 1)
            continue
        dim = int(name.endswith("columns"))
        chunks = tensor.chunk(ranks, dim)
        mine = chunks[rank] if rank < len(chunks) else tensor.narrow(dim, 0, 0)
        size = tensor.shape[dim]
        found[name] = cut(mine.clone(), dim=dim, index=rank, parts=ranks, size=size)
    return found


def empty_like(parts: dict[str, Part]) -> dict[str, Part]:
    return {
        name: Part(torch.full_like(part.tensor, 99), part.shape, part.start)
        for name, part in parts.items()
    }


@pytest.mark.parametrize("writers", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("readers", [1, 2, 3, 4, 8])
def test_what_any_number_of_ranks_wrote_any_number_reads(tmp_path, writers, readers):
    path = tmp_path / MODEL
    for rank in range(writers):
        write_tensors(path, layout(rank, writers), rank=rank, ranks=writers)
    check_whole(path)
    assert tensor_shapes(path) == {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}
    for rank in range(readers):
        wanted = layout(rank, readers)
        found = empty_like(wanted)
        copy_tensors(path, found)
        for name, part in wanted.items():
            assert torch.equal(found[name].tensor, part.tensor), (name, rank)


def test_parts_cut_in_two_dims_are_read_as_one(tmp_path):
    grid: Tensor = torch.arange(24).view(4, 6)
    for rank in range(4):
        at = (rank // 2 * 2, rank % 2 * 3)
        block = grid[at[0] : at[0] + 2, at[1] : at[1] + 3]
        write_tensors(
            tmp_path / "t.safetensors", {"x": Part(block, (4, 6), at)}, rank=rank, ranks=4
        )
    with opened(tmp_path / "t.safetensors") as stored:
        assert torch.equal(stored.read("x", (1, 1), (2, 4)), grid[1:3, 1:5])
        assert stored.dtype("x") == "I64"


def test_a_missing_part_is_damage_and_no_silent_garbage(tmp_path):
    for rank in (0, 2):
        write_tensors(tmp_path / MODEL, layout(rank, 3), rank=rank, ranks=3)
    with pytest.raises(CheckpointError, match=r"parts of cut\.\w+ are missing"):
        copy_tensors(tmp_path / MODEL, copy_of_whole())
    with pytest.raises(AssertionError, match="written"):
        check_whole(tmp_path / MODEL)


def copy_of_whole() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in WHOLE.items()}


def test_of_plain_tensors_rank_0_writes_the_one_copy(tmp_path):
    for rank in range(2):
        write_tensors(tmp_path / MODEL, WHOLE, rank=rank, ranks=2)
    check_whole(tmp_path / MODEL)


def save_together(final: Path, failing: int | None) -> None:
    """What every rank does; rank ``failing`` breaks in the middle."""
    ranks = Ranks(dist.new_group(backend="gloo"))
    with new_checkpoint(final, ranks) as folder:
        if ranks.rank == failing:
            raise OSError(28, "No space left on device")
        write_tensors(
            folder / MODEL, layout(ranks.rank, ranks.size), rank=ranks.rank, ranks=ranks.size
        )
        if ranks.rank == 0:
            for name in (CONFIG, TOKENIZER):
                (folder / name).write_text(name)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_commit_one_checkpoint(tmp_path, size):
    final = tmp_path / "checkpoints" / "step-00000003"
    assert on_ranks(size, save_together, final, None) == [""] * size
    assert [path.name for path in final.parent.iterdir()] == [final.name]
    verify(final)
    manifest = json.loads((final / "MANIFEST.json").read_text())
    assert manifest["world"] == size
    assert manifest["files"].keys() == {p.name for p in final.iterdir()} - {"MANIFEST.json"}
    found = copy_of_whole()
    copy_tensors(final / MODEL, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())


@pytest.mark.parametrize("failing", [0, 3])
def test_one_rank_that_fails_stops_all_names_itself_and_leaves_nothing(tmp_path, failing):
    final = tmp_path / "checkpoints" / "step-00000003"
    said = on_ranks(4, save_together, final, failing)
    assert "No space left" in said.pop(failing)
    assert all(f"rank {failing} could not save its part of" in text for text in said)
    assert list(final.parent.iterdir()) == []


def test_a_manifest_that_lacks_a_ranks_file_is_damaged(tmp_path):
    (tmp_path / "c").mkdir()
    assert on_ranks(2, save_together, tmp_path / "c" / "step-00000001", None) == ["", ""]
    path = tmp_path / "c" / "step-00000001" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][part_path(Path(MODEL), 1).name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lists no model\.rank-00001\.safetensors"):
        verify(path.parent)


def test_one_rank_alone_leaves_no_list_of_its_own(tmp_path):
    seal_own(tmp_path, Ranks())
    assert list(tmp_path.iterdir()) == []
