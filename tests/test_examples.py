"""The examples run, are as short as they promise, and the attention among them is a right one."""

import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fathom
from fathom import settings
from fathom.attention import ATTENTION
from fathom.cli import main
from fathom.ladder.plan import arm_differences, plan
from fathom.ladder.recorded import read_study
from fathom.ladder.study import load_study
from fathom.layers.position import DecoupledRopeConfig
from fathom.model import Decoder
from fathom.train.metrics import read_lines
from small_corpus import small_corpus

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *args: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_under_sixty_lines_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{path.name}" in text


def test_size_prints_a_line_for_each_model(monkeypatch, capsys):
    run("size.py", "tiny-mla", "llama-2-7b", "--seq-len", 100, monkeypatch=monkeypatch)
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "model"
    assert first.split()[:2] == ["tiny-mla", "1,123,712"]
    assert second.split()[:2] == ["llama-2-7b", "6,738,415,616"]
    assert "4 times as much" in last


def test_generate_continues_every_prompt_and_the_cache_is_exact(monkeypatch, capsys):
    options = ("--prompt", "a", "--prompt", "bb", "--tokens", 2)
    run("generate.py", "tiny-mla", *options, monkeypatch=monkeypatch)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("'a' -> ")
    assert second.startswith("'bb' -> ")
    assert float(last.rpartition(" ")[2]) < 1e-5


def test_train_tiny_trains_goes_on_and_writes(monkeypatch, capsys, tmp_path):
    for steps in (1, 2):
        run("train_tiny.py", "--out", tmp_path / "run", "--steps", steps, monkeypatch=monkeypatch)
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"trained {steps} steps")
        assert said[1].startswith("held-out bits per byte: ")
        assert said[2].startswith("The ")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["lr"] == lines[1]["lr"]  # as in a run of two steps that never stopped


# --- The attention of one's own --------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[ModuleType]:
    """The example's module; what it registers is forgotten afterwards."""
    before = dict(ATTENTION)
    sys.path.insert(0, str(EXAMPLES))
    try:
        import own_attention  # pyright: ignore[reportMissingImports]

        yield own_attention
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("own_attention", None)
        ATTENTION.clear()
        ATTENTION.update(before)
        settings.refresh()


@pytest.fixture
def model(own: ModuleType) -> Decoder:
    return fathom.build("tiny-gqa", "groups.0.attention.kind=gated", dtype="float64")


TOKENS = torch.arange(24).view(2, 12) * 37 % 1000


def test_cached_decode_equals_the_full_forward(model):
    whole = model(TOKENS)
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in TOKENS.split([5, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


def test_a_later_token_changes_nothing_before_it(model):
    changed = TOKENS.clone()
    changed[:, 8] += 1
    assert torch.equal(model(TOKENS)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(TOKENS)[:, 8:], model(changed)[:, 8:])


def test_its_counts_are_those_of_the_built_model(model):
    built = sum(parameter.numel() for parameter in model.parameters())
    assert fathom.size(model.cfg)["params"] == built
    plain = fathom.size("tiny-gqa", seq_len=64)
    gates = 4 * 128 * 4  # layers, width, heads
    assert built == plain["params"] + gates
    gated = fathom.size(model.cfg, seq_len=64)
    assert gated["flops_per_token"] == plain["flops_per_token"] + 2 * gates
    assert gated["cache_bytes_per_token"] == plain["cache_bytes_per_token"]


def test_an_open_gate_gives_the_plain_attention(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "w_gate" in name and "attention" in name:
                parameter.zero_()  # sigmoid(0) = 1/2
            if "attention.wo" in name:
                parameter.mul_(2)
    plain = fathom.build("tiny-gqa", dtype="float64")
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0, atol=1e-10)


def test_it_takes_every_position(own):
    cfg = own.GatedConfig(
        n_heads=2, n_kv_heads=1, head_dim=8, position=DecoupledRopeConfig(rope_head_dim=4)
    )
    built = cfg.build(16).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    whole = built(x, fathom.Step.full(x[..., 0]))
    first = built(x[:, :3], fathom.Step.full(x[:, :3, 0]))
    torch.testing.assert_close(whole[:, :3], first)
    assert cfg.num_params(16) == sum(p.numel() for p in built.parameters())
    assert replace(cfg, head_dim=16).num_params(16) > cfg.num_params(16)


def test_its_study_differs_in_one_key(own):
    planned = plan(load_study(EXAMPLES / "own_attention.toml"))
    rates = {p.arm.name: 1e-3 for p in planned}
    differing = arm_differences(planned, rates, tuned=False)["gqa-gated"]
    assert [(d.key.rpartition("attention.")[2], d.arm, d.mark) for d in differing] == [
        ("kind", "gated", "named")
    ]
    gqa, gated = planned
    assert 1 < gated.params / gqa.params < 1.0021


def test_the_ladder_trains_it_beside_its_parent(own, tmp_path, capsys):
    tiny = "seeds=[1] probes=[] budget.value=64 train.tokens_per_step=32 train.warmup_steps=1"
    study, code = EXAMPLES / "own_attention.toml", EXAMPLES / "own_attention.py"
    args = ["ladder", str(study), "--out", str(tmp_path / "own"), "--import", str(code)]
    args += ["--jobs", "0", f"data.source={small_corpus(tmp_path)}", "data.seq_len=32"]
    assert main([*args, *tiny.split()]) == 0, capsys.readouterr().err
    found = read_study(tmp_path / "own")
    gated = found.arm("gqa-gated")
    assert gated is not None
    assert gated.failed is None
    assert gated.verdict is not None
    assert gated.verdict.word == "unsure"  # one seed
    assert (tmp_path / "own" / "report.html").is_file()
