"""Running out of memory says where it went, and settings that would fit."""

import re

import pytest
import torch

from fathom.console import explain
from fathom.train.config import read_run_config
from fathom.train.loop import Trainer
from fathom.train.memory import advice, explained, memory_of, needed

BIG = {
    "model": {"preset": "llama-125m"},
    "data": {"seq_len": 1024, "tokenizer": "4k"},
    "train": {"steps": 1, "tokens_per_step": 65536},
}


def test_three_settings_are_named_and_each_of_them_fits():
    cfg = read_run_config(BIG)
    total = sum(needed(cfg).values()) * 2 // 3
    lines = advice(cfg, total).splitlines()
    assert lines[0].startswith("out of memory: a micro-batch of 64 x 1024 tokens needs about ")
    assert sum("the largest" in line for line in lines) == 1
    assert "activations" in next(line for line in lines if "the largest" in line)
    settings = [
        line.strip().partition(" (")[0] for line in lines[lines.index("these would fit:") + 1 :]
    ]
    assert len(settings) == 3
    for setting in settings:
        assert sum(needed(read_run_config(BIG, setting.split())).values()) < 0.9 * total, setting


def test_master_weights_need_two_bytes_more_of_each_weight():
    plain, master = (
        needed(read_run_config(BIG, ["train.dtype=bf16", f"train.rounding={rounding}"]))
        for rounding in ("nearest", "master")
    )
    more = master.pop("optimizer") - plain.pop("optimizer")
    assert (more, master) == (plain["weights"], plain)


def test_where_nothing_fits_that_is_said():
    assert advice(read_run_config(BIG), 10**6).endswith("a smaller model, or more GPUs, would fit")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_a_run_without_memory_ends_with_the_table(make_config, fit, monkeypatch, error, capsys):
    def step(self) -> None:
        raise error

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="out of memory: a micro-batch of 4 x 32") as caught:
        fit(make_config())
    assert explain(caught.value) == 1
    assert re.search(r"weights +0\.00 GB", capsys.readouterr().err)


def test_other_errors_pass_through(make_config):
    with (
        pytest.raises(RuntimeError, match=r"^shapes$"),
        explained(make_config(), torch.device("cpu")),
    ):
        raise RuntimeError("shapes")


def test_the_machine_has_memory():
    assert memory_of(torch.device("cpu")) > 10**8
