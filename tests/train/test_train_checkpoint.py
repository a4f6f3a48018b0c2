"""What guards a run folder: the lock, the disk, the identity of the run, the random state."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from fathom.convert.parts import Part, cut
from fathom.convert.ranks import Ranks
from fathom.convert.run_folder import CheckpointError, committed, load_model, save_model
from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.model import build_model
from fathom.settings import ConfigError, to_toml
from fathom.train import checkpoint
from fathom.train.checkpoint import (
    Parts,
    Progress,
    check_disk,
    check_folder,
    check_same_run,
    init_from,
    locked,
    random_state,
    restore,
    save,
    set_random_state,
)
from fathom.train.config import RunConfig
from fathom.train.optim import Optimizer
from ranks import on_ranks

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def parts(make_config) -> Parts:
    cfg = make_config()
    model = build_model(cfg.model, seed=3)
    optimizer = Optimizer(model, cfg.train)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3, torch.zeros(()))
    return Parts(model, optimizer, Progress(7, 900, 1, 2), {"row": 5})


def test_what_is_saved_comes_back(make_config, parts, tokenizer, run_dir):
    cfg = make_config("train.steps=9")
    torch.manual_seed(11)
    folder = save(run_dir, cfg, parts, tokenizer)
    drawn = torch.rand(4)
    model = build_model(cfg.model, seed=8)
    fresh = Parts(model, Optimizer(model, cfg.train))
    restore(folder, fresh)
    assert fresh.progress == Progress(7, 900, 1, 2)
    assert fresh.loader == {"row": 5}
    for name, tensor in parts.optimizer.state().items():
        assert torch.equal(fresh.optimizer.state()[name], tensor), name
    for name, tensor in parts.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(torch.rand(4), drawn)


def rows_of(name: str, tensor: torch.Tensor) -> torch.Tensor | Part:
    """This rank's rows of every weight and of its optimizer state; scalars and buffers whole."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if tensor.ndim == 0 or "expert_bias" in name:
        return tensor
    rows = tensor.chunk(size)[rank] if rank < len(tensor.chunk(size)) else tensor[:0]
    return cut(rows, dim=0, index=rank, parts=size, size=len(tensor))


def save_rows(run: Path, cfg: RunConfig, parts: Parts, tokenizer: Tokenizer) -> None:
    ranks = Ranks(dist.new_group(backend="gloo"))
    save(run, cfg, replace(parts, place=rows_of), tokenizer, ranks)


def test_a_checkpoint_of_three_ranks_is_that_of_one(make_config, parts, tokenizer, run_dir):
    cfg = make_config()
    run_dir.mkdir()
    assert on_ranks(3, save_rows, run_dir, cfg, parts, tokenizer) == ["", "", ""]
    (folder,) = committed(run_dir)
    model = build_model(cfg.model, seed=8)
    fresh = Parts(model, Optimizer(model, cfg.train))
    restore(folder, fresh)
    assert fresh.progress == parts.progress
    for now, before in (
        (model.state_dict(), parts.model.state_dict()),
        (fresh.optimizer.state(), parts.optimizer.state()),
        (load_model(run_dir)[0].state_dict(), parts.model.state_dict()),
    ):
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_nothing_in_a_checkpoint_is_a_pickle_or_names_the_folder(
    make_config, parts, tokenizer, run_dir
):
    folder = save(run_dir, make_config(), parts, tokenizer)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".toml"}
    for path in folder.iterdir():
        assert str(run_dir).encode() not in path.read_bytes()


def test_state_of_another_optimizer_is_refused(make_config, parts, tokenizer, run_dir):
    folder = save(run_dir, make_config(), parts, tokenizer)
    cfg = make_config("train.optimizer=muon")
    model = build_model(cfg.model)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not fit"):
        restore(folder, Parts(model, Optimizer(model, cfg.train)))


@pytest.mark.parametrize(
    "change",
    [{"step": "x"}, {"rng": {"cpu": "AAAA"}}, {"rng": {}}, {"tokens": None}, {"loader": ...}],
    ids=str,
)
def test_a_state_that_makes_no_sense_is_refused(make_config, parts, tokenizer, run_dir, change):
    folder = save(run_dir, make_config(), parts, tokenizer)
    state = {**json.loads((folder / "state.json").read_text()), **change}
    state = {key: value for key, value in state.items() if value is not ...}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be used"):
        restore(folder, parts)


def test_a_full_disk_keeps_the_checkpoint_before(
    make_config, parts, tokenizer, run_dir, monkeypatch
):
    before = save(run_dir, make_config(), parts, tokenizer)

    def full(path: Path, data: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    parts.progress.step = 8
    with pytest.raises(OSError, match=r"cannot save .*step-00000008 .*MB.*: No space left"):
        save(run_dir, make_config(), parts, tokenizer)
    assert committed(run_dir) == [before]
    assert [path.name for path in before.parent.iterdir()] == [before.name]


def test_the_random_state_is_plain_text_and_goes_back():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        state = json.loads(json.dumps(random_state(torch.device("cpu"))))
        first = torch.rand(3)
        torch.rand(100)
        set_random_state(state, torch.device("cpu"))
        assert torch.equal(torch.rand(3), first)


def test_keys_that_differ_are_named_with_both_values(make_config, run_dir):
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(to_toml(make_config()))
    check_same_run(run_dir, make_config("train.save_every=1"))
    other = make_config("model.groups.1.ffn.top_k=1", "train.init_from=elsewhere")
    with pytest.raises(ConfigError) as caught:
        check_same_run(run_dir, other)
    assert "model.groups.1.ffn.top_k was 2 and is 1" in str(caught.value)
    assert "train.init_from was none and is elsewhere" in str(caught.value)


def test_a_folders_config_that_cannot_be_read_is_an_unusable_checkpoint(make_config, run_dir):
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("model = 3")
    with pytest.raises(CheckpointError, match=r"config\.toml cannot be used"):
        check_same_run(run_dir, make_config())


def test_a_second_run_in_the_folder_is_refused_while_the_first_lasts(run_dir):
    with locked(run_dir):
        (run_dir / "config.toml").touch()
        with pytest.raises(ValueError, match="another process is training in"), locked(run_dir):
            pass
    with locked(run_dir):
        pass


def test_a_refused_run_leaves_no_folder_behind(run_dir):
    with pytest.raises(KeyError), locked(run_dir):
        raise KeyError
    assert not run_dir.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_results_without_a_config_are_not_ours_to_go_on_with(run_dir):
    run_dir.mkdir()
    (run_dir / "notes.txt").touch()
    check_folder(run_dir)
    (run_dir / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl but no config\.toml"):
        check_folder(run_dir)


@pytest.mark.parametrize(("free", "warns"), [(1000, False), (250, True), (120, True)])
def test_too_little_room_is_said_before_the_start(tmp_path, monkeypatch, free, warns):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2000, 0, free))
    warning = check_disk(tmp_path, needed=100, keep=2)
    assert (warning is not None) == warns
    assert warning is None or "train.keep=2" in warning


def test_no_room_for_one_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2000, 0, 90))
    with pytest.raises(OSError, match="make room"):
        check_disk(tmp_path, needed=100, keep=2)


def test_training_begins_with_the_weights_of_init_from(make_config, parts, tokenizer, tmp_path):
    save_model(parts.model, tokenizer, tmp_path / "model")
    model = build_model(make_config().model, seed=5)
    init_from(tmp_path / "model", model, tokenizer)
    for name, tensor in parts.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_init_from_with_other_shapes_is_refused_and_names_both(
    make_config, parts, tokenizer, tmp_path
):
    save_model(parts.model, tokenizer, tmp_path / "model")
    wider = build_model(make_config("model.groups.0.ffn.inter_dim=64").model)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn.*\[32, 48\].*\[32, 64\]"):
        init_from(tmp_path / "model", wider, tokenizer)


def test_init_from_with_another_tokenizer_is_refused_and_names_both(
    make_config, parts, tokenizer, tmp_path
):
    other: Tokenizer = train_tokenizer(["some other text"], 300)
    save_model(parts.model, other, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tokenizer \w{12} and this run's .* \w{12}"):
        init_from(tmp_path / "model", parts.model, tokenizer)
