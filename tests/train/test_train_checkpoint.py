"""What is in a checkpoint, that it comes back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import distributed as dist

from fathom.convert.parts import Part, cut
from fathom.convert.ranks import Ranks
from fathom.convert.run_folder import CheckpointError, committed, load_model, save_model
from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.model import build_model
from fathom.train import checkpoint
from fathom.train.checkpoint import (
    Parts,
    Progress,
    init_from,
    random_state,
    restore,
    save,
    set_random_state,
    snapshot,
)
from fathom.train.config import RunConfig
from fathom.train.guards import SpikeGuard
from fathom.train.optim import Optimizer
from ranks import on_ranks


@pytest.fixture
def parts(make_config) -> Parts:
    cfg = make_config()
    model = build_model(cfg.model, seed=3)
    optimizer = Optimizer(model, cfg.train)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3, torch.zeros(()))
    guard = SpikeGuard(6.0, torch.device("cpu"))
    guard.judge(torch.tensor(3.0), torch.tensor(0.1))
    guard.heard(6)
    return Parts(model, optimizer, guard, Progress(7, 900, 1, 2), {"row": 5})


def fresh_parts(cfg: RunConfig) -> Parts:
    model = build_model(cfg.model, seed=8)
    return Parts(model, Optimizer(model, cfg.train), SpikeGuard(6.0, torch.device("cpu")))


def test_what_is_saved_comes_back(make_config, parts, tokenizer, run_dir):
    cfg = make_config("train.steps=9")
    torch.manual_seed(11)
    folder = save(run_dir, snapshot(cfg, parts, tokenizer))
    drawn = torch.rand(4)
    fresh = fresh_parts(cfg)
    restore(folder, fresh)
    assert fresh.progress == Progress(7, 900, 1, 2)
    assert fresh.loader == {"row": 5}
    assert fresh.guard.state() == parts.guard.state()
    assert fresh.guard.window_2W[:, -1].tolist() == parts.guard.window_2W[:, -1].tolist()
    for name, tensor in parts.optimizer.state().items():
        assert torch.equal(fresh.optimizer.state()[name], tensor), name
    for name, tensor in parts.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor), name
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
    save(run, snapshot(cfg, replace(parts, place=rows_of), tokenizer), ranks)


def test_a_checkpoint_of_three_ranks_is_that_of_one(make_config, parts, tokenizer, run_dir):
    cfg = make_config()
    run_dir.mkdir()
    assert on_ranks(3, save_rows, run_dir, cfg, parts, tokenizer) == ["", "", ""]
    (folder,) = committed(run_dir)
    fresh = fresh_parts(cfg)
    restore(folder, fresh)
    assert fresh.progress == parts.progress
    for now, before in (
        (fresh.model.state_dict(), parts.model.state_dict()),
        (fresh.optimizer.state(), parts.optimizer.state()),
        (load_model(run_dir)[0].state_dict(), parts.model.state_dict()),
    ):
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_its_bytes_are_those_of_the_whole_tensors_however_they_are_held(
    make_config, parts, tokenizer
):
    tensors = [*parts.model.state_dict().values(), *parts.optimizer.state().values()]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def one_row(_: str, tensor: torch.Tensor) -> torch.Tensor | Part:
        if tensor.ndim == 0:
            return tensor
        return cut(tensor[:1], dim=0, index=0, parts=len(tensor), size=len(tensor))

    for place in (None, one_row):
        taken = snapshot(make_config(), replace(parts, place=place), tokenizer)
        assert taken.num_bytes == whole


def test_tensors_that_cannot_be_written_are_an_error_of_the_save(
    make_config, parts, tokenizer, run_dir, monkeypatch
):
    def refuse(*args: object, **more: object) -> None:
        raise SafetensorError("no such dtype")

    monkeypatch.setattr(checkpoint, "write_tensors", refuse)
    with pytest.raises(OSError, match=r"cannot save .*: no such dtype; the checkpoints before it"):
        save(run_dir, snapshot(make_config(), parts, tokenizer))


def test_nothing_in_a_checkpoint_is_a_pickle_or_names_the_folder(
    make_config, parts, tokenizer, run_dir
):
    folder = save(run_dir, snapshot(make_config(), parts, tokenizer))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".toml"}
    for path in folder.iterdir():
        assert str(run_dir).encode() not in path.read_bytes()


def test_state_of_another_optimizer_is_refused(make_config, parts, tokenizer, run_dir):
    folder = save(run_dir, snapshot(make_config(), parts, tokenizer))
    cfg = make_config("train.optimizer=muon")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not fit"):
        restore(folder, fresh_parts(cfg))


@pytest.mark.parametrize(
    "change",
    [{"step": "x"}, {"rng": {"cpu": "AAAA"}}, {"rng": {}}, {"tokens": None}, {"loader": ...}],
    ids=str,
)
def test_a_state_that_makes_no_sense_is_refused(make_config, parts, tokenizer, run_dir, change):
    folder = save(run_dir, snapshot(make_config(), parts, tokenizer))
    state = {**json.loads((folder / "state.json").read_text()), **change}
    state = {key: value for key, value in state.items() if value is not ...}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be used"):
        restore(folder, parts)


def test_a_full_disk_keeps_the_checkpoint_before(
    make_config, parts, tokenizer, run_dir, monkeypatch
):
    before = save(run_dir, snapshot(make_config(), parts, tokenizer))

    def full(path: Path, data: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    parts.progress.step = 8
    with pytest.raises(OSError, match=r"cannot save .*step-00000008 .*bytes.*: No space left"):
        save(run_dir, snapshot(make_config(), parts, tokenizer))
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
