"""The loop: learning, accumulating, stopping and going on, guarding, recording."""

import json
import math
import signal

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fathom.convert.run_folder import CheckpointError, committed, load_model
from fathom.data.loader import Loader
from fathom.model import build_model
from fathom.settings import ConfigError
from fathom.train.config import read_run_config
from fathom.train.device import compile_blocks, uncompiled
from fathom.train.evaluate import evaluate
from fathom.train.loop import train
from fathom.train.metrics import Record, read_lines
from fathom.train.progress import Reporter
from fathom.train.stop import StopSignals
from runs import Notices, files, records

NAMES = {"step", "tokens", "loss", "bpb", "lr", "grad_norm", "tokens_per_second", "memory_bytes"}
OF_TORCH_COMPILE = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


# --- Learning ---


def test_the_loss_falls_and_the_held_out_text_is_read_better(make_config, fit, run_dir):
    result = fit(make_config("train.steps=60", "train.eval_every=30"))
    first, second = read_lines(run_dir / "eval.jsonl")
    losses = [record["loss"] for record in records(run_dir)]
    assert losses[0] == pytest.approx(math.log(1024), rel=0.05)
    assert losses[-1] < 4
    assert second["val_bpb"] < first["val_bpb"] < losses[0] / math.log(2)
    assert result.evaluation is not None
    assert result.evaluation.mean == second["val_bpb"]
    assert (result.reason, result.exit_code, result.step) == ("done", 0, 60)
    assert result.tokens == 60 * 128


def test_the_same_seed_gives_the_same_run_and_the_same_checkpoint_bytes(make_config, fit, tmp_path):
    for name in ("a", "b"):
        fit(make_config(), tmp_path / name)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert files(committed(tmp_path / "a")[-1]) == files(committed(tmp_path / "b")[-1])


def test_another_seed_gives_another_run(make_config, fit, tmp_path):
    for seed in (1, 2):
        fit(make_config(f"train.seed={seed}"), tmp_path / str(seed))
    assert records(tmp_path / "1")[0]["loss"] != records(tmp_path / "2")[0]["loss"]


def test_the_callers_random_state_is_left_alone(make_config, fit):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(make_config("train.steps=1"))
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_batches_add_up_to_the_step_they_split(make_config, fit, tmp_path):
    """Losses to rounding; documents, MTP targets and bias updates do not depend on the split."""
    for micro in ("4", "2", "1"):
        cfg = make_config(f"train.micro_batch_size={micro}", "train.steps=3", "train.lr=1e-3")
        fit(cfg, tmp_path / micro)
    whole = records(tmp_path / "4")
    bias = load_model(tmp_path / "4")[0].state_dict()["blocks.1.ffn.router.expert_bias"]
    assert bias.abs().max() > 0
    for micro in ("2", "1"):
        for a, b in zip(records(tmp_path / micro), whole, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["mtp_loss"] == pytest.approx(b["mtp_loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a["tokens"] == b["tokens"]
        split = load_model(tmp_path / micro)[0].state_dict()["blocks.1.ffn.router.expert_bias"]
        assert torch.equal(split, bias)


def test_the_ramp_reads_fewer_tokens_at_first(make_config, fit, run_dir):
    fit(make_config("train.ramp_from_tokens=32", "train.ramp_steps=3", "train.steps=5"))
    tokens = [record["tokens"] for record in records(run_dir)]
    assert tokens == [32, 96, 192, 320, 448]


@pytest.mark.parametrize("dtype", ["bf16_autocast", "bf16"])
def test_narrow_arithmetic_learns_too(make_config, fit, run_dir, dtype):
    fit(make_config(f"train.dtype={dtype}", "train.steps=25"))
    lines = records(run_dir)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    weights = load_model(run_dir)[0].state_dict()
    assert weights["head.weight"].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert weights["blocks.1.ffn.router.expert_bias"].dtype == torch.float32


def test_muon_learns(make_config, fit, run_dir):
    fit(make_config("train.optimizer=muon", "train.steps=30"))
    lines = records(run_dir)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.5


def test_activation_checkpointing_changes_no_bit(make_config, fit, tmp_path):
    for name in ("false", "true"):
        fit(make_config(f"train.activation_checkpointing={name}"), tmp_path / name)
    assert records(tmp_path / "true") == records(tmp_path / "false")


def test_deterministic_algorithms_hold_within_the_run_alone(make_config, fit):
    seen = []
    fit(
        make_config("train.deterministic=true", "train.steps=1"),
        should_stop=lambda: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


# --- Records ---


def test_every_step_has_one_line_with_the_agreed_names(make_config, fit, run_dir):
    fit(make_config("train.log_load=true"))
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.keys() >= NAMES | {"max_violation", "dead_experts", "load_entropy"}
        assert "mfu" not in line  # only on a GPU
        assert len(line["layers"]) == 2  # the MoE layer and MTP's
        for layer in line["layers"]:
            assert sum(layer["load"]) == pytest.approx(4)
            assert max(layer["load"]) - 1 == pytest.approx(layer["max_violation"], abs=1e-6)
        assert line["total_loss"] == pytest.approx(
            line["loss"] + 0.3 * line["mtp_loss"] + line["balance_loss"], rel=1e-5
        )


def test_a_dense_model_has_no_routing_figures(dataset, make_config, fit, run_dir):
    fit(make_config("model.mtp=none", "model.groups.1.ffn={kind='dense', inter_dim=16}"))
    assert all(line.keys() & {"max_violation", "layers"} == set() for line in records(run_dir))


def test_bits_per_byte_are_those_of_the_targets(make_config, dataset, run_dir):
    cfg = make_config("train.steps=1")
    train(cfg, run_dir, dataset=dataset, should_stop=lambda: False)
    batch = Loader(dataset, cfg.data, batch_size=4, seed=0).next()
    targets = batch.targets[batch.targets >= 0].numpy()
    tokenizer = dataset.tokenizer
    size = tokenizer.token_bytes[targets].sum() + tokenizer.is_symbol[targets].sum()
    (line,) = records(run_dir)
    assert line["bpb"] == pytest.approx(line["loss"] * len(targets) / (math.log(2) * size))


def test_the_folder_holds_the_whole_config_and_the_environment(make_config, fit, run_dir):
    cfg = make_config()
    fit(cfg)
    assert read_run_config(run_dir / "config.toml") == cfg
    env = json.loads((run_dir / "env.json").read_text())
    assert env["torch"] == torch.__version__
    assert env["device"] == "cpu"
    assert {path.name for path in run_dir.iterdir()} == {
        *(".lock", "config.toml", "env.json", "metrics.jsonl", "eval.jsonl", "checkpoints")
    }


def test_samples_are_written_when_they_are_due(make_config, fit):
    notices = Notices()
    fit(
        make_config("train.sample_every=4"),
        reporter=notices,
        sample=lambda model, tokenizer: f"{type(model).__name__} {tokenizer.vocab_size}",
    )
    assert notices.heard == ["4: Decoder 1024", "6: Decoder 1024"]


# --- Stopping and going on ---


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_chain_of_stops_is_the_run_that_never_stopped_bit_by_bit(
    make_config, fit, tmp_path, name
):
    cfg = make_config(
        *("train.steps=12", f"train.optimizer={name}", "train.eval_every=4", "train.save_every=5"),
        *("train.ramp_from_tokens=64", "train.ramp_steps=6", "train.warmup_steps=3"),
    )
    fit(cfg, tmp_path / "whole")
    reasons = [fit(cfg, tmp_path / "parts", stop_at=n).reason for n in (1, 6, 2, None)]
    assert reasons == ["interrupted", "interrupted", "interrupted", "done"]
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    eval_files = [tmp_path / part / "eval.jsonl" for part in ("parts", "whole")]
    assert eval_files[0].read_text() == eval_files[1].read_text()
    ends = [committed(tmp_path / part)[-1] for part in ("parts", "whole")]
    assert ends[0].name == "step-00000012"
    assert files(ends[0]) == files(ends[1])


def test_an_interrupted_run_says_how_to_go_on(make_config, fit, run_dir):
    result = fit(make_config(), stop_at=2)
    assert (result.reason, result.exit_code, result.step) == ("interrupted", 75, 2)
    assert f"fathom train {run_dir / 'config.toml'} --out {run_dir}" in result.message
    assert [path.name for path in committed(run_dir)] == ["step-00000002"]


def test_a_run_goes_on_when_its_steps_are_raised(make_config, fit, run_dir):
    fit(make_config("train.steps=4", "train.schedule=constant"))
    result = fit(make_config("train.steps=7", "train.schedule=constant"))
    assert (result.reason, result.step) == ("done", 7)
    assert [record["step"] for record in records(run_dir)] == [1, 2, 3, 4, 5, 6, 7]
    assert read_run_config(run_dir / "config.toml").train.steps == 7


def test_a_finished_run_is_done_at_once(make_config, fit, run_dir):
    first = fit(make_config("train.eval_every=6"))
    before = files(committed(run_dir)[-1]), records(run_dir)
    again = fit(make_config("train.eval_every=6"))
    assert again.reason == "done"
    assert (again.evaluation.mean, again.tokens) == (first.evaluation.mean, first.tokens)
    assert (files(committed(run_dir)[-1]), records(run_dir)) == before


def test_fewer_steps_than_are_done_are_refused(make_config, fit):
    fit(make_config())
    with pytest.raises(ConfigError, match=r"train.steps is 3 and .* has done 6"):
        fit(make_config("train.steps=3"))


def test_another_recipe_in_the_same_folder_is_refused_by_its_keys(make_config, fit, run_dir):
    fit(make_config())
    before = (run_dir / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"train\.lr was 0\.01 and is 0\.5; .*--out"):
        fit(make_config("train.lr=0.5"))
    assert (run_dir / "config.toml").read_text() == before


def test_a_run_killed_before_its_first_save_begins_again(make_config, fit, run_dir):
    cfg = make_config()
    fit(cfg)
    whole = records(run_dir)
    for path in committed(run_dir):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    fit(cfg)
    assert records(run_dir) == whole


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(make_config, fit, run_dir, tmp_path):
    cfg = make_config("train.steps=6", "train.save_every=2")
    fit(cfg, tmp_path / "whole")
    fit(cfg, stop_at=5)
    newest = committed(run_dir)[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    notices = Notices()
    fit(cfg, reporter=notices)
    (notice,) = notices.heard
    assert "step-00000005" in notice
    assert "going back" in notice
    assert records(run_dir) == records(tmp_path / "whole")


def test_a_strict_run_refuses_a_damaged_newest_checkpoint(make_config, fit, run_dir):
    cfg = make_config("train.save_every=2")
    fit(cfg, stop_at=5)
    (committed(run_dir)[-1] / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged.*; without --strict"):
        fit(cfg, strict=True)
    assert fit(cfg).reason == "done"


def test_a_change_of_recipe_with_consent_is_told_and_kept(make_config, fit, run_dir):
    fit(make_config(), stop_at=3)
    notices = Notices()
    fit(make_config("train.lr=1e-4"), reporter=notices, allow_change=["train.lr"])
    assert notices.heard == ["going on with a change: train.lr was 0.01 and is 0.0001"]
    assert records(run_dir)[-1]["lr"] < 1e-4
    assert read_run_config(run_dir / "config.toml").train.lr == 1e-4


def test_with_every_checkpoint_damaged_nothing_is_begun_anew(make_config, fit, run_dir):
    fit(make_config())
    for folder in committed(run_dir):
        (folder / "MANIFEST.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint of"):
        fit(make_config())


def test_checkpoints_of_every_so_many_steps_stay_for_ever(make_config, fit, run_dir):
    fit(make_config("train.save_every=1", "train.keep_every=2"))
    assert [path.name[-1] for path in committed(run_dir)] == ["2", "4", "5", "6"]


def test_only_the_newest_checkpoints_stay(make_config, fit, run_dir):
    fit(make_config("train.save_every=1", "train.keep=3"))
    assert [path.name[-1] for path in committed(run_dir)] == ["4", "5", "6"]


def test_leftovers_of_an_interrupted_save_are_removed_and_nothing_else(make_config, fit, run_dir):
    fit(make_config("train.steps=2"))
    leftover = run_dir / "checkpoints" / f"step-00000004.tmp-{'a1' * 16}"
    foreign = run_dir / "checkpoints" / "step-00000004.tmp-mine"
    for folder in (leftover, foreign):
        folder.mkdir()
        (folder / "file").write_text("x")
    fit(make_config("train.steps=3"))
    assert not leftover.exists()
    assert foreign.exists()


def test_a_torn_last_line_of_the_metrics_is_mended(make_config, fit, run_dir):
    fit(make_config(), stop_at=3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    fit(make_config())
    assert [record["step"] for record in records(run_dir)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_a_second_interrupt_at_once(number):
    with StopSignals() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_during_training_saves(make_config, dataset, run_dir):
    class Killer(Reporter):
        def step(self, record: Record) -> None:
            if record["step"] == 2:
                signal.raise_signal(signal.SIGTERM)

    result = train(make_config(), run_dir, dataset=dataset, reporter=Killer())
    assert result.reason == "interrupted"
    assert [path.name for path in committed(run_dir)] == [f"step-{result.step:08d}"]


# --- Compiling ---


def test_what_cannot_be_compiled_is_said_and_left_alone(make_config, monkeypatch):
    model = build_model(make_config().model)
    notices = Notices()

    def compiled(*_: object) -> None:
        raise RuntimeError("no compiler\nand a long story")

    def lazily(block: nn.Module) -> None:
        block._compiled_call_impl = compiled

    monkeypatch.setattr(nn.Module, "compile", lazily)

    def warm_up() -> None:
        model(torch.zeros(1, 4, dtype=torch.int64))

    assert not compile_blocks(model, warm_up, notices.notice)
    assert notices.heard == [
        "train.compile=true cannot be had here (no compiler); going on without it"
    ]
    warm_up()


def test_only_another_model_is_compiled_anew(make_config, monkeypatch):
    counter = CompileCounter()
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend=counter))

    def compiled(seed: int, *overrides: str) -> int:
        model, before = build_model(make_config(*overrides).model, seed=seed), counter.frame_count
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        assert compile_blocks(model, lambda: model(tokens), Notices().notice)
        return counter.frame_count - before

    other = "model.norm_eps=1e-4"
    # A dense block and one with experts.
    assert [compiled(1), compiled(2), compiled(1, other), compiled(1)] == [2, 0, 2, 2]


def test_evaluating_runs_the_blocks_as_they_were_written(make_config):
    model = build_model(make_config().model)
    tokens = torch.zeros(1, 4, dtype=torch.int64)

    def compiled(*_: object) -> None:
        raise RuntimeError("compiled")

    for block in model.blocks:
        block._compiled_call_impl = compiled
    with uncompiled(model):
        model(tokens)
    with pytest.raises(RuntimeError, match="compiled"):
        model(tokens)


@pytest.mark.slow
@OF_TORCH_COMPILE
def test_compiled_blocks_train_as_plain_ones_do(make_config, fit, tmp_path):
    notices = Notices()
    for name in ("false", "true"):
        fit(make_config(f"train.compile={name}"), tmp_path / name, reporter=notices)
    assert notices.heard == []
    plain, compiled = (records(tmp_path / name) for name in ("false", "true"))
    for a, b in zip(plain, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# --- Refusals ---


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_written(
    make_config, fit, run_dir
):
    with pytest.raises(ConfigError, match=r"set model\.vocab_size=1024"):
        fit(make_config("model.vocab_size=1000"))
    assert not run_dir.exists()


def test_a_larger_vocabulary_is_allowed(make_config, fit):
    assert fit(make_config("model.vocab_size=1100", "train.steps=1")).reason == "done"


def test_a_device_that_is_not_there_is_refused(make_config, fit, run_dir):
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"train.device={missing}"):
        fit(make_config(f"train.device={missing}"))
    assert not run_dir.exists()


def test_the_model_comes_back_from_the_run_folder(make_config, fit, dataset, run_dir):
    result = fit(make_config("train.eval_every=6"))
    model, tokenizer = load_model(run_dir)
    assert isinstance(model, nn.Module)
    assert tokenizer.to_bytes() == dataset.tokenizer.to_bytes()
    assert evaluate(model, dataset, seq_len=32).mean == pytest.approx(result.evaluation.mean)
