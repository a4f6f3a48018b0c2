"""Every layout trains as one process does: losses, gradients, initial and held-out values."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fathom.config import ParallelConfig
from fathom.data.dataset import Dataset
from fathom.data.loader import IGNORE, Loader
from fathom.model import build_model
from fathom.parallel import build
from fathom.parallel.mesh import local, started
from fathom.parallel.shard import model_parts, of_whole
from fathom.settings import ConfigError
from fathom.train import loop, optim
from fathom.train.config import RunConfig
from layouts import LAYOUTS, follow
from ranks import on_ranks

FAST = ("fsdp2-ep2",)


@pytest.fixture
def train64(run_dir, dataset) -> Callable[..., torch.Tensor]:
    """``train64(cfg)``: in as many processes as it asks for; the losses of each step."""

    def run(cfg: RunConfig, stop_at: int | None = None, out: Path = run_dir) -> torch.Tensor:
        if cfg.parallel.world == 1:
            follow(cfg, out, dataset, stop_at)
        else:
            said = on_ranks(cfg.parallel.world, follow, cfg, out, dataset, stop_at)
            assert not any(said), "\n".join(said)
        return torch.tensor(json.loads((out / "told.json").read_text()), dtype=torch.float64)

    return run


@pytest.fixture
def alone(make_config, train64, tmp_path_factory) -> torch.Tensor:
    """The losses of one process."""
    folder = tmp_path_factory.getbasetemp() / "alone"
    if not (folder / "told.json").exists():
        train64(make_config(), out=folder)
    return torch.tensor(json.loads((folder / "told.json").read_text()), dtype=torch.float64)


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS]
)
def test_twenty_steps_in_float64_are_those_of_one_process(
    layout, alone, make_config, train64, run_dir, tmp_path_factory
):
    got = train64(make_config(*LAYOUTS[layout]))
    torch.testing.assert_close(got, alone, rtol=1e-10, atol=0)
    want = held_out(tmp_path_factory.getbasetemp() / "alone")
    assert held_out(run_dir) == pytest.approx(want, rel=1e-6)


def held_out(folder: Path) -> list[float]:
    """The evaluations of a run, whose documents the ranks share unevenly; sums in float32."""
    lines = (folder / "eval.jsonl").read_text().splitlines()
    return [json.loads(line)["val_bpb"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "ep2-shard2"])
def test_compiled_blocks_leave_the_exchange_out_and_train_the_same(
    layout, alone, make_config, train64, monkeypatch
):
    def complain(_: loop.Reporter, sentence: str) -> None:
        raise AssertionError(sentence)  # that blocks could not be compiled

    compiling = nn.Module.compile
    monkeypatch.setattr(loop.Reporter, "notice", complain)
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiling(block, backend="aot_eager"))
    cfg = make_config("train.compile=true", "train.steps=20", *LAYOUTS[layout])
    got = train64(cfg, stop_at=2)
    torch.testing.assert_close(got, alone[:2], rtol=1e-10, atol=0)


def in_full_precision(x: torch.Tensor) -> torch.Tensor:
    """Muon's iteration, in which a rounding cannot turn into another bfloat16."""
    a, b, c = optim.NS_COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(optim.NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("layout", ["fsdp2-ep2"])
def test_muon_updates_matrices_whose_rows_lie_on_several_ranks(
    layout, make_config, train64, tmp_path, monkeypatch
):
    monkeypatch.setattr(optim, "orthogonal", in_full_precision)
    muon = ["train.optimizer=muon", "train.steps=4", "train.eval_every=0", "train.save_every=9"]
    want = train64(make_config(*muon), out=tmp_path / "alone")
    got = train64(make_config(*muon, *LAYOUTS[layout]))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def check_parts(cfg: RunConfig, dataset: Dataset) -> None:
    """Initial values bit by bit, and gradients, against the whole model."""
    with started(cfg.parallel, "cpu") as layout:
        how = {"seed": 3, "device": torch.device("cpu"), "dtype": torch.float64}
        model, whole = build(cfg.model, layout, **how), build_model(cfg.model, **how)
        weights = dict(whole.named_parameters())
        for name, part in model_parts(model, layout).items():
            want = weights[name] if name in weights else whole.get_buffer(name)
            assert torch.equal(part.tensor, of_whole(want, part)), name
        sizes = {"batch_size": 8, "seed": 0}
        mine = Loader(dataset, cfg.data, **sizes, rank=layout.rank, world=layout.world).next()
        batch = Loader(dataset, cfg.data, **sizes).next()
        count, world = int((batch.targets != IGNORE).sum()), layout.world
        for net, part, share in ((model, mine, 1 / world), (whole, batch, 1.0)):
            of = (part.tokens, part.targets, part.cu_seqlens)
            net.loss(*of, denominator=count, share=share).total.backward()
        parts = model_parts(model, layout)
        for name, weight in model.named_parameters():
            want = of_whole(weights[name].grad, parts[name])
            torch.testing.assert_close(local(weight.grad), want, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("layout", ["ep2-shard2", "fsdp2-ep2"])
def test_initial_values_and_gradients_are_parts_of_the_whole_ones(layout, make_config, dataset):
    cfg = make_config(*LAYOUTS[layout])
    said = on_ranks(cfg.parallel.world, check_parts, cfg, dataset)
    assert not any(said), "\n".join(said)


CHAIN = ["train.steps=8", "train.eval_every=0", "train.save_every=2"]


def test_a_run_goes_on_in_any_other_layout(make_config, train64, alone):
    """1, 2, 4 and 1 processes, data parallel and then expert parallel."""
    short = [item for item in CHAIN if "steps" not in item]
    for end, layout in ((2, []), (4, LAYOUTS["fsdp2"]), (6, LAYOUTS["fsdp2-ep2"]), (8, [])):
        got = train64(make_config(*short, *layout), stop_at=2)
        torch.testing.assert_close(got, alone[end - 2 : end], rtol=1e-10, atol=0)


def test_a_stopped_run_of_four_ranks_goes_on_bit_by_bit(make_config, train64, tmp_path):
    cfg = make_config(*CHAIN, "train.steps=4", *LAYOUTS["dp2-ep2"])
    want = train64(cfg, out=tmp_path / "unbroken")
    train64(cfg, stop_at=3)
    assert torch.equal(train64(cfg), want[3:])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["parallel.ep=16", "train.micro_batch_size=16"], "must divide n_routed_experts"),
        (["parallel.dp=3"], "3 processes .* cannot share equally"),
        (["parallel.dp=4", "parallel.shard=3"], "shard must divide dp"),
        (["parallel.ep=4", "parallel.dp=2", "parallel.shard=0"], "shard must be at least 1"),
        (["parallel.tp=2"], "tp must be 1, got 2: only dp and ep exist so far"),
        (["parallel.timeout=0"], "timeout must be above 0"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_a_process_starts(make_config, keys, said):
    with pytest.raises(ConfigError, match=said):
        make_config(*keys)


def check_lead() -> None:
    def refuse() -> None:
        raise ConfigError("not this folder")

    with started(ParallelConfig(dp=2), "cpu") as layout:
        assert layout.lead(lambda: ["step-00000004", None]) == ["step-00000004", None]
        with pytest.raises(ConfigError if layout.leads else SystemExit):
            layout.lead(refuse)


def test_what_rank_0_finds_all_get_and_what_it_refuses_ends_all():
    assert on_ranks(2, check_lead) == ["", ""]


def test_a_layout_without_its_processes_is_refused(make_config, run_dir, dataset):
    with pytest.raises(ConfigError, match="2 \\* 1 = 2 processes and 1 was started"):
        loop.train(make_config("parallel.dp=2"), run_dir, dataset=dataset)
    assert not run_dir.exists()
