"""What training must do on a GPU: never wait within a step, skip on the device, resume, compile."""

import os
from dataclasses import replace

import pytest
import torch

from fathom.convert.run_folder import committed, load_model
from fathom.train import guards
from fathom.train.loop import Trainer, train
from fathom.train.metrics import read_lines
from fathom.train.progress import Reporter
from fathom.train.step import Learner
from runs import Notices, files, records

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture
def trainer(make_config, dataset, run_dir):
    def make(*overrides: str) -> Trainer:
        run_dir.mkdir()
        cfg = make_config("train.device=cuda", *overrides)
        device = torch.device("cuda", 0)
        quiet = Reporter()
        return Trainer(
            cfg, run_dir, dataset, device=device, reporter=quiet, sample=None, start=None
        )

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["bf16_autocast", "bf16"])
def test_a_step_never_waits_for_the_device(trainer, optimizer, dtype):
    loop = trainer(
        f"train.optimizer={optimizer}", f"train.dtype={dtype}", "train.micro_batch_size=2"
    )
    loop.step()
    loop.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loop.journal.flush()
    assert len(read_lines(loop.out / "metrics.jsonl")) == 3
    loop.close()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_on_the_device(trainer, optimizer):
    loop = trainer(f"train.optimizer={optimizer}")
    loop.step()
    state = {**loop.learner.model.state_dict(), **loop.learner.optimizer.state()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    weight = loop.learner.model.norm.weight
    handle = weight.register_hook(lambda grad: grad * float("nan"))
    loop.step()
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    loop.step()
    loop.journal.flush()
    assert [line.get("skipped") for line in read_lines(loop.out / "metrics.jsonl")] == [
        None,
        True,
        None,
    ]
    loop.close()


def test_resuming_in_deterministic_mode_is_bitwise(make_config, dataset, tmp_path):
    cfg = make_config("train.device=cuda", "train.deterministic=true")
    train(cfg, tmp_path / "whole", dataset=dataset, should_stop=lambda: False)
    calls = iter(range(10))
    train(cfg, tmp_path / "parts", dataset=dataset, should_stop=lambda: next(calls) == 2)
    train(cfg, tmp_path / "parts", dataset=dataset, should_stop=lambda: False)
    names = ("whole", "parts")
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in names
    ]
    assert losses[0] == losses[1]
    ends = [committed(tmp_path / name)[-1] / "model.safetensors" for name in names]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize("micro", ["", "train.micro_batch_size=2"], ids=["whole", "in parts"])
def test_a_replayed_step_is_the_launched_one(make_config, dataset, tmp_path, micro):
    losses = {}
    for graph in ("false", "true"):
        heard: list[str] = []
        options = ["train.device=cuda", "train.dtype=bf16", f"train.cuda_graph={graph}"]
        cfg = make_config("train.deterministic=true", *options, *filter(None, [micro]))
        reporter = Reporter()
        reporter.notice = heard.append
        train(cfg, tmp_path / graph, dataset=dataset, reporter=reporter)
        assert heard == []
        lines = read_lines(tmp_path / graph / "metrics.jsonl")
        losses[graph] = [(line["loss"], line["grad_norm"]) for line in lines]
    # a count in memory divides, a host's number is multiplied by its inverse: the last digit
    assert torch.allclose(*map(torch.tensor, losses.values()), rtol=1e-3)


def test_a_compiled_run_learns_and_reports_its_mfu(make_config, dataset, run_dir):
    heard: list[str] = []

    class Listener(Reporter):
        def notice(self, sentence: str) -> None:
            heard.append(sentence)

    cfg = make_config(
        *("train.device=cuda", "train.compile=true", "train.dtype=bf16_autocast"),
        *("train.steps=40", "train.eval_every=40"),
    )
    result = train(cfg, run_dir, dataset=dataset, reporter=Listener(), should_stop=lambda: False)
    assert heard == []
    lines = read_lines(run_dir / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.5
    assert result.evaluation is not None
    if "H100" in torch.cuda.get_device_name() or "H200" in torch.cuda.get_device_name():
        assert 0 < lines[-1]["mfu"] < 1
    assert load_model(run_dir, device="cuda")[0].embed.weight.is_cuda


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_hundred_steps_repeat_to_the_bit(make_config, dataset, tmp_path, optimizer):
    """Gate A on a GPU: losses, norms and the bytes of the last checkpoint."""
    cfg = make_config(
        *("train.device=cuda", "train.deterministic=true", "train.steps=200"),
        *(f"train.optimizer={optimizer}", "train.save_every=200"),
    )
    for name in ("first", "second"):
        train(cfg, tmp_path / name, dataset=dataset, should_stop=lambda: False)
    assert records(tmp_path / "first") == records(tmp_path / "second")
    ends = [committed(tmp_path / name)[-1] for name in ("first", "second")]
    assert files(ends[0]) == files(ends[1])


def test_spikes_on_the_device_send_a_run_back(make_config, fit, run_dir, monkeypatch):
    """As on a CPU, with no wait for the device in between."""
    monkeypatch.setattr(guards, "WINDOW", 8)
    losses = Learner.losses

    def poisoned(self, batch, **more):
        result = losses(self, batch, **more)
        last = self.loader.state()["row"] - 1
        return replace(result, total=result.total * 100) if last in range(48, 64) else result

    monkeypatch.setattr(Learner, "losses", poisoned)
    cfg = make_config("train.device=cuda", "train.steps=20", "train.save_every=4")
    notices = Notices()
    assert fit(cfg, reporter=notices).reason == "done"
    assert "back from step 17 to 12" in notices.heard[-1]
    assert [line["step"] for line in records(run_dir)] == list(range(1, 21))
