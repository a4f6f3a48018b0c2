"""Checkpoints: there whole or not at all, checked before use, byte-identical, never executed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fathom.attention import MHAConfig
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.convert import run_folder
from fathom.convert.run_folder import (
    CheckpointError,
    checkpoint_path,
    commit,
    committed,
    copy_tensors,
    find_checkpoint,
    load_model,
    new_checkpoint,
    newest,
    prune,
    read_json,
    save_model,
    seal,
    step_of,
    sweep,
    verify,
    write_json,
    write_tensors,
)
from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.ffn import DenseConfig, MoEConfig
from fathom.ffn.balance import AuxLossFree
from fathom.layers.position import RopeConfig
from fathom.model import Decoder, build_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED / "tokenizer-1k.json")


def config(*, tied: bool = False, dim: int = 16) -> ModelConfig:
    attention = MHAConfig(n_heads=2, n_kv_heads=1, head_dim=8, position=RopeConfig())
    moe = MoEConfig(n_routed_experts=4, top_k=2, inter_dim=8, balance=(AuxLossFree(),))
    groups = (
        LayerGroup(count=1, attention=attention, ffn=DenseConfig(inter_dim=24)),
        LayerGroup(count=1, attention=attention, ffn=moe),
    )
    return ModelConfig(
        vocab_size=1024, dim=dim, groups=groups, tie_embeddings=tied, mtp=MTPConfig()
    )


@pytest.fixture
def model() -> Decoder:
    model = build_model(config(), seed=4)
    model.state_dict()["blocks.1.ffn.router.expert_bias"].copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return model


@pytest.fixture
def saved(model, tokenizer, tmp_path) -> Path:
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def make_run(run: Path, *steps: int) -> None:
    """A run folder with small checkpoints that are whole, though no models."""
    for step in steps:
        with new_checkpoint(checkpoint_path(run, step)) as folder:
            for name in ("model.safetensors", "tokenizer.json", "config.toml"):
                (folder / name).write_text(f"{name} {step}")


# --- Models ---


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_model_computes_the_same_bits(tokenizer, tmp_path, tied):
    model = build_model(config(tied=tied), seed=1)
    save_model(model, tokenizer, tmp_path / "out")
    back, words = load_model(tmp_path / "out")
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(back(tokens), model(tokens))
    assert back.cfg == model.cfg
    assert words.encode("a text") == tokenizer.encode("a text")


def test_weights_come_in_the_dtype_that_is_asked_for_and_the_routing_bias_stays_float32(
    saved, model
):
    back, _ = load_model(saved, dtype=torch.bfloat16)
    for name, tensor in back.state_dict().items():
        stored = model.state_dict()[name]
        if "expert_bias" in name:
            assert torch.equal(tensor, stored)
        else:
            assert torch.equal(tensor, stored.bfloat16()), name
    assert load_model(saved)[0].embed.weight.dtype == torch.float32


def test_bfloat16_weights_are_stored_and_read_as_they_are(model, tokenizer, tmp_path):
    save_model(build_model(config(), dtype=torch.bfloat16), tokenizer, tmp_path / "out")
    assert load_model(tmp_path / "out")[0].embed.weight.dtype == torch.bfloat16
    assert load_model(tmp_path / "out", dtype=torch.float32)[0].embed.weight.dtype == torch.float32


@pytest.mark.gpu
def test_a_model_is_loaded_onto_the_device_that_is_asked_for(saved):
    back, _ = load_model(saved, device="cuda")
    assert back(torch.zeros(1, 3, dtype=torch.int64, device="cuda")).is_cuda


def test_equal_models_are_equal_files(model, tokenizer, saved, tmp_path):
    save_model(model, tokenizer, tmp_path / "elsewhere" / "again")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "elsewhere" / "again" / path.name).read_bytes()


def test_an_existing_folder_is_not_overwritten(model, tokenizer, saved):
    before = (saved / "MANIFEST.json").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        save_model(model, tokenizer, saved)
    assert (saved / "MANIFEST.json").read_bytes() == before


def test_everyone_who_may_read_the_folder_may_read_the_weights(saved):
    modes = {(path.stat().st_mode & 0o444) for path in saved.iterdir()}
    assert modes == {saved.stat().st_mode & 0o444}


@pytest.mark.parametrize("where", ["empty folder", "no folder"])
def test_what_is_no_checkpoint_is_refused(tmp_path, where):
    path = tmp_path if where == "empty folder" else tmp_path / "missing"
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor a run folder"):
        load_model(path)


@pytest.mark.parametrize("change", ["missing", "unknown", "reshaped"])
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(saved, change):
    tensors = load_file(saved / "model.safetensors")
    if change == "missing":
        del tensors["blocks.0.ffn_norm.weight"]
    elif change == "unknown":
        tensors["blocks.0.ffn_norm.weights"] = torch.ones(1)
    else:
        tensors["blocks.0.ffn_norm.weight"] = torch.ones(17)
    save_file(tensors, saved / "model.safetensors")
    seal(saved)
    message = {
        "missing": r"ffn_norm.weight is absent there, and the model's is \[16\]",
        "unknown": r"ffn_norm.weights is \[1\] there, and the model's is absent",
        "reshaped": r"ffn_norm.weight is \[17\] there, and the model's is \[16\]",
    }[change]
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_config_that_asks_for_more_memory_than_the_file_holds_is_refused_first(saved):
    text = (saved / "config.toml").read_text().replace("dim = 16", "dim = 65536", 1)
    (saved / "config.toml").write_text(text)
    seal(saved)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(saved)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", b"[model]\ndim = 'wide'"),
        ("config.toml", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": 1}'),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{broken header}"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x80\x02}q\x00."),  # a pickle
    ],
)
def test_a_file_that_cannot_be_read_is_an_unusable_checkpoint(saved, name, content):
    (saved / name).write_bytes(content)
    seal(saved)
    with pytest.raises(CheckpointError, match=name):
        load_model(saved)


def test_copying_between_sets_of_other_names_or_shapes_is_refused(tmp_path):
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"differ in b"):
        copy_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"a is \[2\], not \[3\]"):
        copy_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(3)})


def test_views_and_strided_tensors_are_written_by_value(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "t.safetensors", {"t": whole.t(), "column": whole[:, 1].clone()})
    back = load_file(tmp_path / "t.safetensors")
    assert torch.equal(back["t"], whole.t())


# --- Damage ---


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.toml"])
@pytest.mark.parametrize("damage", ["cut", "grown", "flipped", "removed", "linked"])
def test_any_damage_is_found_and_names_the_file(saved, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "grown":
        path.write_bytes(content + b" ")
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.rename(saved.parent / name)
        if damage == "linked":
            path.symlink_to(saved.parent / name)
    with pytest.raises(CheckpointError, match=name):
        verify(saved)


def test_every_single_flipped_bit_of_a_sample_is_found(saved):
    draw = random.Random(0)
    paths = sorted(saved.iterdir())
    for _ in range(60):
        path = draw.choice(paths)
        content = path.read_bytes()
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        if path.name != "MANIFEST.json" or _means_otherwise(content, path.read_bytes()):
            with pytest.raises(CheckpointError):
                verify(saved)
        path.write_bytes(content)
    verify(saved)


def _means_otherwise(before: bytes, after: bytes) -> bool:
    """Whether a flipped bit in the manifest touched what it says of a file (not its ``world``)."""
    try:
        changed = json.loads(after)
    except ValueError:
        return True
    known = json.loads(before)
    return any(changed.get(key) != known[key] for key in ("files", "format"))


def test_sizes_are_checked_even_when_hashes_are_not(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    verify(saved, hashes=False)
    load_model(saved, hashes=False)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="bytes"):
        load_model(saved, hashes=False)


def entry(size: object = 1, sha256: object = "0" * 64) -> dict:
    return {"bytes": size, "sha256": sha256}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": "1"},
        {"files": []},
        {"files": {}},
        {"files": {"../outside": entry()}},
        {"files": {"/etc/passwd": entry()}},
        {"files": {"..": entry()}},
        {"files": {"a": entry(size="1")}},
        {"files": {"a": entry(size=True)}},
        {"files": {"a": entry(sha256="x")}},
        {"files": {"a": entry(sha256=3)}},
        {"files": {"a": 3}},
    ],
    ids=str,
)
def test_a_manifest_that_is_not_ours_is_refused(saved, change):
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    if isinstance(change.get("files"), dict) and change["files"]:
        change = {"files": manifest["files"] | change["files"]}
    write_json(saved / "MANIFEST.json", manifest | change)
    with pytest.raises(CheckpointError, match=r"MANIFEST|format|damaged"):
        verify(saved)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000, "\x00"], ids=repr)
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_json(tmp_path / "x.json")


def test_a_huge_json_file_is_refused_unread(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        read_json(tmp_path / "x.json")


# --- Runs ---


def test_the_newest_whole_checkpoint_is_found_and_damage_is_told(tmp_path):
    make_run(tmp_path, 9, 100, 20)
    told: list[str] = []
    assert newest(tmp_path, warn=told.append) == checkpoint_path(tmp_path, 100)
    assert told == []
    (checkpoint_path(tmp_path, 100) / "config.toml").write_text("")
    shutil.rmtree(checkpoint_path(tmp_path, 20) / "MANIFEST.json", ignore_errors=True)
    assert newest(tmp_path, warn=told.append) == checkpoint_path(tmp_path, 20)
    assert len(told) == 1
    assert "step-00000100" in told[0]


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest(tmp_path, warn=pytest.fail) is None
    make_run(tmp_path / "run")
    assert newest(tmp_path / "run", warn=pytest.fail) is None


def test_the_latest_is_derived_from_names_that_are_committed(tmp_path):
    make_run(tmp_path, 5)
    for name in ("step-00000009.tmp-abc", "step-9", "latest", "step-000000123456789", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert committed(tmp_path) == [checkpoint_path(tmp_path, 5)]
    assert step_of(committed(tmp_path)[0]) == 5


def test_a_run_folder_and_one_of_its_checkpoints_can_both_be_named(model, tokenizer, tmp_path):
    save_model(model, tokenizer, checkpoint_path(tmp_path, 3))
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 3)
    assert find_checkpoint(checkpoint_path(tmp_path, 3)) == checkpoint_path(tmp_path, 3)
    assert torch.equal(load_model(tmp_path)[0].embed.weight, model.embed.weight)


def test_pruning_keeps_the_newest(tmp_path):
    make_run(tmp_path, 1, 2, 3, 10)
    prune(tmp_path, keep=2)
    assert [step_of(path) for path in committed(tmp_path)] == [3, 10]
    prune(tmp_path, keep=5)
    assert len(committed(tmp_path)) == 2


@pytest.mark.parametrize(
    ("before", "left"),
    [(None, [4, 8, 10]), (3, [2, 4, 8, 10]), (2, [1, 4, 8, 10]), (9, [4, 8, 10])],
)
def test_pruning_keeps_what_a_run_may_return_to_and_every_so_many(tmp_path, before, left):
    make_run(tmp_path, 1, 2, 3, 4, 8, 10)
    prune(tmp_path, keep=2, every=4, needed_before=before)
    assert [step_of(path) for path in committed(tmp_path)] == left


def test_a_block_that_fails_leaves_nothing(tmp_path):
    make_run(tmp_path, 1)
    with suppress(KeyError), new_checkpoint(checkpoint_path(tmp_path, 2)) as folder:
        (folder / "model.safetensors").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    make_run(tmp_path, 1, 2)
    (checkpoint_path(tmp_path, 2) / "config.toml").write_text("damaged")
    make_run(tmp_path, 2)
    verify(checkpoint_path(tmp_path, 2))
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


def test_files_and_folders_are_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events: list[str] = []
    rename = os.rename
    monkeypatch.setattr(run_folder, "sync", lambda path: events.append(path.name.split(".tmp")[0]))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append("rename") or rename(a, b))
    make_run(tmp_path, 1)
    assert events == [
        *("config.toml", "model.safetensors", "tokenizer.json", "MANIFEST.json"),
        *("step-00000001", "rename", "checkpoints"),
    ]


@pytest.mark.parametrize("call", ["sync", "sha256", "write_json", "rename"])
def test_a_failure_at_any_point_keeps_the_checkpoints_before(tmp_path, monkeypatch, call):
    make_run(tmp_path, 1, 2)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if call == "rename" else run_folder, call, fail)
        with pytest.raises(OSError, match="No space left"):
            make_run(tmp_path, 3)
    assert newest(tmp_path, warn=pytest.fail) == checkpoint_path(tmp_path, 2)
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


def test_sweeping_removes_our_leftovers_and_follows_no_link(tmp_path):
    make_run(tmp_path, 1)
    inside, ours = tmp_path / "checkpoints", f"step-00000002.tmp-{'0f' * 16}"
    (inside / ours).mkdir()
    (inside / ours / "model.safetensors").touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (inside / f"step-00000003.tmp-{'0f' * 16}").symlink_to(tmp_path / "precious")
    (inside / "step-00000002.tmp-mine").mkdir()
    sweep(tmp_path)
    assert not (inside / ours).exists()
    assert (tmp_path / "precious" / "file").exists()
    assert (inside / "step-00000002.tmp-mine").exists()
    assert committed(tmp_path)
    sweep(tmp_path / "no-run-yet")


def test_sealing_and_committing_apart_serve_many_writers(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000004.tmp-shared"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json", "config.toml", "rank-1.safetensors"):
        (folder / name).write_text(name)  # each could come from another process
    seal(folder)
    commit(folder, checkpoint_path(tmp_path, 4))
    assert newest(tmp_path, warn=pytest.fail) == checkpoint_path(tmp_path, 4)


def _save_for_ever(run: Path) -> None:
    step = step_of(committed(run)[-1])
    while True:
        step += 1
        with new_checkpoint(checkpoint_path(run, step)) as folder:
            for name in ("model.safetensors", "tokenizer.json", "config.toml"):
                (folder / name).write_bytes(bytes([step % 256]) * 200_000)
        prune(run, keep=2)


def test_a_writer_killed_at_any_moment_loses_no_committed_checkpoint(tmp_path):
    make_run(tmp_path, 1)
    draw = random.Random(1)
    context = multiprocessing.get_context("fork")
    reached = 1
    for _ in range(25):
        writer = context.Process(target=_save_for_ever, args=(tmp_path,))
        writer.start()
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        folder = newest(tmp_path, warn=pytest.fail)
        assert folder is not None
        assert step_of(folder) >= reached
        reached = step_of(folder)
        sweep(tmp_path)
        assert len(committed(tmp_path)) == len(os.listdir(tmp_path / "checkpoints"))
        for left in committed(tmp_path):
            verify(left)
    assert reached > 1


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text.replace(" ", "  ")])
def test_a_manifest_that_says_the_same_in_other_bytes_is_damaged_too(saved, change):
    path = saved / "MANIFEST.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match="not every byte"):
        verify(saved)


@pytest.mark.parametrize("world", [0, -1, "1", True, 1.0])
def test_a_manifest_of_no_number_of_processes_is_damaged(saved, world):
    path = saved / "MANIFEST.json"
    write_json(path, {**json.loads(path.read_text()), "world": world})
    with pytest.raises(CheckpointError, match="processes wrote it"):
        verify(saved)
