"""Tensors out of a folder of safetensors; headers, indexes and names that lie are refused first."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fathom.convert import files
from fathom.convert.files import open_inside, read_bytes, read_object
from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import INDEX, SINGLE, FolderSource

TENSORS = {
    "a.weight": torch.arange(15.0).view(3, 5),
    "b.weight": torch.arange(7).bfloat16(),
    "c.bias": torch.arange(4, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3),
    "small": torch.arange(-3, 3).float().to(torch.float8_e4m3fn).view(2, 3),
}


def write(path: Path, header: Any, content: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


# --- What is whole ---


def test_every_tensor_is_read_as_it_was_written(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    source = FolderSource(tmp_path)
    assert source.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert source.entries[name].shape == tuple(tensor.shape)
        assert source.entries[name].dtype == tensor.dtype
        assert source.entries[name].num_bytes == tensor.nbytes
        assert same(source.read(name), tensor)
        source.release(name)
        assert same(source.read(name), tensor)


def test_the_index_decides_which_file_holds_a_tensor(tmp_path):
    save_file({"a": torch.ones(2), "old": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "y-00001-of-000163.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y-00001-of-000163.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    source = FolderSource(tmp_path)
    assert set(source.entries) == {"a", "b"}
    assert source.read("a").tolist() == [1, 1]


def test_tensors_that_do_not_begin_at_a_multiple_of_their_size_are_read(tmp_path):
    header = {"x": entry("U8", [1], [0, 1]), "y": entry("F32", [2], [1, 9])}
    write(tmp_path / SINGLE, header, b"\7" + struct.pack("<2f", 1.5, -2))
    assert FolderSource(tmp_path).read("y").tolist() == [1.5, -2]


def test_entries_are_in_the_order_of_the_file(tmp_path):
    header = {"late": entry(offsets=(8, 16)), "early": entry(offsets=(0, 8))}
    write(tmp_path / SINGLE, header, bytes(16))
    assert list(FolderSource(tmp_path).entries) == ["early", "late"]


# --- Headers that lie ---

BAD_HEADERS = {
    "no json": (b"{broken}", 0),
    "a list": (b"[1, 2]", 0),
    "deep": (b"[" * 100_000, 0),
    "many lists": (b'{"data_offsets": [' + b"[]," * 10_000 + b"[]]}", 0),
    "twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), 8),
    "nan": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', 8),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "same bytes": ({"a": entry(), "b": entry()}, 8),
    "cut short": ({"a": entry()}, 7),
    "bytes after the end": ({"a": entry()}, 9),
    "late begin": ({"a": entry(offsets=(1, 9))}, 9),
    "negative": ({"a": entry(offsets=(-8, 0))}, 8),
    "backwards": ({"a": entry(offsets=(8, 0))}, 8),
    "huge": ({"a": entry(shape=(2**59, 2**59), offsets=(0, 2**59))}, 8),
    "negative sizes": ({"a": entry(shape=(-1, -2))}, 8),
    "true": ({"a": entry(shape=(True, 2))}, 8),
    "fraction": ({"a": entry(shape=(2.0,))}, 8),
    "text": ({"a": entry(shape="2")}, 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, 8),
    "more keys": ({"a": entry(more=1)}, 8),
    "other size": ({"a": entry(shape=(3,))}, 8),
    "other type": ({"a": entry("F16")}, 8),
    "unknown type": ({"a": entry("COMPLEX")}, 8),
    "type no text": ({"a": entry(["F32"])}, 8),  # pyright: ignore
    "no name": ({"": entry()}, 8),
    "number for a tensor": ({"a": 3}, 8),
    "null for a tensor": ({"a": None}, 8),
    "many dims": ({"a": entry(shape=(1,) * 9 + (2,))}, 8),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_is_not_true_is_refused(tmp_path, case):
    header, size = BAD_HEADERS[case]
    write(tmp_path / SINGLE, header, bytes(size))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 3, 2**40, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be_is_refused(tmp_path, length):
    write(tmp_path / SINGLE, {"a": entry()}, bytes(8), length=length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("size", range(0, 90, 11))
def test_a_file_cut_anywhere_is_refused(tmp_path, size):
    write(tmp_path / SINGLE, {"a": entry()}, bytes(8))
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[: min(size, len(whole) - 1)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FolderSource(tmp_path)


# --- Indexes and folders that lie ---


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "C:x.safetensors",
        "..",
        "",
        "x.bin",
        "x\0.safetensors",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["x.safetensors"],
    ],
    ids=repr,
)
def test_an_index_that_names_no_file_of_the_folder_is_refused(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no safetensors file inside the folder"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        FolderSource(tmp_path)


def test_a_tensor_or_file_that_the_index_promises_must_be_there(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks the tensor 'b'"):
        FolderSource(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"cannot read .*y\.safetensors"):
        FolderSource(tmp_path)


def test_an_index_of_too_many_files_is_refused(tmp_path):
    names = {f"t{i}": f"{i}.safetensors" for i in range(1001)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="more than 1,000 files"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match=f"{name}, a pickle, which can run code"):
        FolderSource(tmp_path)


def test_an_empty_folder_holds_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        FolderSource(tmp_path)


def test_links_pipes_and_folders_are_not_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "real.safetensors")
    (tmp_path / SINGLE).symlink_to("real.safetensors")
    with pytest.raises(CheckpointError, match="is a link"):
        FolderSource(tmp_path)
    (tmp_path / SINGLE).unlink()
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        FolderSource(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        FolderSource(tmp_path)
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match="is a link"):
        open_inside(tmp_path, "null")


# --- The hub's cache ---


@pytest.fixture
def cached(tmp_path) -> Path:
    """A snapshot of the hub's cache."""
    model = tmp_path / "models--someone--tiny"
    snapshot = model / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    save_file({"a": torch.ones(2)}, model / "blobs" / "0f0f")
    (snapshot / SINGLE).symlink_to("../../blobs/0f0f")
    return snapshot


def test_the_hub_cache_links_to_its_own_blobs(cached, tmp_path):
    assert FolderSource(cached).read("a").tolist() == [1, 1]
    (tmp_path / "here").symlink_to(cached)
    assert FolderSource(tmp_path / "here").read("a").tolist() == [1, 1]


@pytest.mark.parametrize(
    "target",
    [
        "../../blobs/../secret",
        "../../../secret",
        "/etc/hostname",
        "../../blobs/link",
        "../../blobs",
    ],
)
def test_a_link_of_the_hub_cache_to_anything_else_is_refused(cached, tmp_path, target):
    for folder in (cached.parent.parent, tmp_path):
        save_file({"a": torch.ones(2)}, folder / "secret")
    (cached.parent.parent / "blobs" / "link").symlink_to("../secret")
    (cached / SINGLE).unlink()
    (cached / SINGLE).symlink_to(target)
    with pytest.raises(CheckpointError, match=r"is a link|not a regular file"):
        FolderSource(cached)


def test_blobs_that_are_a_link_themselves_are_refused(cached, tmp_path):
    blobs = cached.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        FolderSource(cached)


# --- Small files ---


def test_a_json_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_object(tmp_path, "config.json") == {"a": 1}
    assert read_bytes(tmp_path, "config.json", 8) == b'{"a": 1}'
    with pytest.raises(CheckpointError, match="larger than 7 bytes"):
        read_bytes(tmp_path, "config.json", 7)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b'{"a": Infinity}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a": %s}' % (b"9" * 5000),
    ],
    ids=lambda content: content[:16].hex(),
)
def test_what_is_no_plain_json_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        read_object(tmp_path, "config.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        read_object(tmp_path, "config.json")
    assert not files.exists(tmp_path, "config.json")
