"""The command line: quick help, settings anywhere, exit codes, and a last line that helps."""

import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import fathom
from fathom import cli, console
from fathom.cli import main
from fathom.console import clean, gather_settings, show_table, si
from fathom.presets import preset
from fathom.settings import ConfigError, to_data

CONFIG = """
[model]
preset = "tiny-deepseek"
dim = 64
vocab_size = 1024
[data]
seq_len = 32
[train]
steps = 2
tokens_per_step = 128
eval_bytes = 2000
log_every = 1
"""

VERBS = {  # verb: its options (a change here is a change for users: CHANGELOG)
    "ladder": "--out --dry-run --list --only --add-seeds --jobs --minutes --set --import",
    "report": "",
    "train": "--out --size --deterministic --strict --allow-change --nproc --set --import",
    "compare": "--margin --format --import",
    "generate": "--prompt --max-new-tokens --temperature --top-k --top-p --min-p "
    "--repetition-penalty --presence-penalty --frequency-penalty --seed --stop --top-logprobs "
    "--symbols --device --dtype --format --import",
    "chat": "--system --max-new-tokens --temperature --top-k --top-p --min-p "
    "--repetition-penalty --presence-penalty --frequency-penalty --seed --device --dtype --import",
    "fetch": "",
    "convert": "--format --dtype --verify --force",
    "size": "--seq-len --cache-dtype --parallel --format --set --import",
    "presets": "--format",
    "config": "--keys --schema --set --import",
    "data prepare": "--out --tokenizer --vocab-size --size-mb --force",
    "data facts": "--out --people --seed --vocab-size --force",
    "data peek": "--batch --rows --seed --seq-len",
    "eval": "--data --seq-len --max-bytes --device --dtype --format --import",
    "probe": "--data --seq-len --seed --device --import",
    "inspect": "--text --ranks --replicas --out --layer --head --max-tokens --device --import",
    "runs": "--format",
    "chaos": "--out --steps --kills --flips --seed --format --set --import",
    "env": "--ops --format",
}


def run(*args: str) -> int:
    return main([*args])


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two steps, made by the verb itself."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(CONFIG)
    assert main(["train", str(folder / "tiny.toml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of someone's own notes, made by the verb itself."""
    folder = tmp_path_factory.mktemp("notes")
    words = "so it was and so it will be in the end they said "
    for number in range(120):
        text = f"{words} {number} times {words[number % 20 :]}"
        (folder / f"note-{number}.txt").write_text(text * 3)
    out = folder / "prepared"
    ask = ["data", "prepare", str(folder), "--out", str(out), "--vocab-size", "300"]
    assert main(ask) == 0
    return out


def own_run(prepared: Path) -> list[str]:
    """Arguments of a one-step run on the prepared notes."""
    model = ["--size", "tiny-gqa", "model.vocab_size=300", "data.seq_len=16"]
    steps = ["train.steps=1", "train.tokens_per_step=32"]
    return [*model, f"data.source={prepared}", *steps]


# --- Help ------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'altair', 'tokenizers', 'fathom.settings'}"
    code = (
        "import sys; from fathom.cli import main; assert main(['--help']) == 0;"
        f"main(['train', '--help']); assert not {heavy} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_the_flags_are_frozen() -> None:
    found = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # pyright: ignore
        for sub, verb in getattr(command, "commands", {"": command}).items():
            options = [name for param in verb.params for name in param.opts if name[0] == "-"]
            found[f"{name} {sub}".strip()] = options
    assert found == {verb: options.split() for verb, options in VERBS.items()}


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_shows_an_example_of_that_verb(verb: str, capsys) -> None:
    assert run(*verb.split(), "--help") == 0
    assert f"Example:\n    fathom {verb}" in capsys.readouterr().out


def test_version_is_one_line(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{fathom.__version__}\n"


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "fathom", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert last_line(done.stderr) == ("error: No such command 'nonsense'; see fathom --help")


# --- Settings among the arguments ------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "want"),
    [
        ("c.toml train.steps=5", "c.toml --set train.steps=5"),
        ("train.steps=5 c.toml", "--set train.steps=5 c.toml"),
        ("--train.steps 5 c.toml", "--set train.steps=5 c.toml"),
        ("--train.steps=5 c.toml", "--set train.steps=5 c.toml"),
        ("--set a=1 b.c=2", "--set a=1 --set b.c=2"),
        ("model.groups.*.ffn.kind=moe", "--set model.groups.*.ffn.kind=moe"),
        ("--train.lr -1", "--set train.lr=-1"),
        ("margin=0.02", "--set margin=0.02"),
        ("--out a.b=c x.y=1", "--out a.b=c --set x.y=1"),
        ("--out", "--out"),
        ("--dry-run a.b=1", "--dry-run --set a.b=1"),
        ("runs/lr=3/config.toml", "runs/lr=3/config.toml"),
        ("--outt 3", "--outt 3"),
        ("model.mtp=none", "--set model.mtp=none"),
    ],
)
def test_settings_are_found_wherever_they_stand(args: str, want: str) -> None:
    assert list(gather_settings(args.split(), {"--out", "--set"})) == want.split()


def test_a_setting_may_hold_spaces_and_lines() -> None:
    value = "lr.rates={a = 1e-3,\n b = 2e-3}"
    assert list(gather_settings([value], set())) == ["--set", value]


def test_all_ways_to_set_a_key_give_the_same_config(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    outputs = []
    for way in (["train.lr=2e-3"], ["--train.lr", "2e-3"], ["--set", "train.lr=2e-3"]):
        assert run("config", str(tmp_path / "c.toml"), *way) == 0
        outputs.append(tomllib.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0]["train"]["lr"] == 2e-3


# --- Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["size"], 2, "Missing argument 'MODEL'; see"),
        (["size", "deepseekv3"], 2, "did you mean 'deepseek-v3'?"),
        (["size", "tiny-llama", "--seqlen", "3"], 2, "--seq-len"),
        (["size", "tiny-llama", "--seq-len", "0"], 2, "seq_len must be at least 1, got 0"),
        (["size", "tiny-llama", "--seq-len", "x"], 2, "Invalid value for '--seq-len'"),
        (["size", "tiny-llama", "dimm=3"], 2, "unknown key dimm: did you mean dim?"),
        (["size", "tiny-llama", "--train.steps"], 2, "--train.steps needs a value"),
        (["size", "gone.toml"], 2, "there is no gone.toml"),
        (["presets", "nothing-like-it"], 2, "did you mean"),
        (["config", "gone.toml"], 2, "cannot read the config gone.toml"),
        (["train"], 2, "train is missing"),
        (["train", "--size", "llama-5m"], 2, "train is missing"),
        (["train", "--size", "llama-5m", "train.stepz=3"], 2, "did you mean steps?"),
        (["generate", "./gone/run"], 3, "is neither a checkpoint nor a run folder"),
        (["generate", "deepseek-v3"], 2, "random weights are made up to 2,000,000,000"),
        (["generate", "tiny-llama", "--device", "tpu"], 2, "--device must be one of auto, cpu"),
        (["generate", "tiny-llama", "--top-p", "2"], 2, "top_p must be from 0 to 1"),
        (["generate", "llama-5m", "--dtype", "int4"], 2, "dtype must be one of float32"),
        (["eval", "tiny-llama", "--data", "gone"], 3, "is not a prepared corpus"),
        (["probe", "tarot", "tiny-llama"], 2, "choose from domains, "),
        (["ladder", "gone"], 2, "no study 'gone'"),
        (["report", "gone"], 3, "gone"),
        (["data", "peek", "gone"], 3, "is not a prepared corpus"),
        (["data", "prepare", "gone.txt", "--out", "x"], 3, "gone.txt"),
        (["size", "tiny-llama", "--import", "gone.py"], 2, "there is no such Python file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_in_a_line_that_helps(args, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert words in last_line(err)
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (ConfigError("dim must be even"), 2, "error: dim must be even"),
        (ValueError("top_p is too large"), 2, "error: top_p is too large"),
        (RuntimeError("the device is gone"), 1, "error: the device is gone"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (MemoryError(), 1, "out of memory: lower train.micro_batch_size or data.seq_len"),
        (
            KeyError("x"),
            1,
            "this is a bug in fathom: see it with --debug, report it with the output of fathom env",
        ),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_has_its_exit_code_and_last_line(error, code, last, capsys) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    assert console.guarded(app, []) == code
    assert last_line(capsys.readouterr().err) == last


def test_debug_shows_the_stack_anywhere(capsys) -> None:
    assert run("size", "nothing-like-it", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert last_line(err).startswith("error: no preset is called 'nothing-like-it'")


# --- Reading verbs ---------------------------------------------------------------------------


def test_size_as_json_is_the_public_size(capsys) -> None:
    assert run("size", "deepseek-v3", "--seq-len", "4096", "--format", "json") == 0
    got = json.loads(capsys.readouterr().out)
    assert got == fathom.size("deepseek-v3", seq_len=4096)
    assert got["params"] == 671_026_404_352


def test_size_for_people_names_what_decides(capsys) -> None:
    assert run("size", "deepseek-v2-lite", "groups.1.count=3") == 0
    out = capsys.readouterr().out
    assert f"{fathom.size(fathom.build('tiny-llama').cfg)['layers']}" in out
    assert "31,104" not in out
    for word in ("parameters", "FLOPs per token", "cache", "to run", "to train", "longest"):
        assert word in out


def test_presets_lists_all_and_prints_one_whole(capsys) -> None:
    assert run("presets") == 0
    assert "kimi-k2" in capsys.readouterr().out
    assert run("presets", "tiny-mla") == 0
    assert tomllib.loads(capsys.readouterr().out) == {"model": to_data(preset("tiny-mla"))}
    assert run("presets", "--format", "json") == 0
    listed = {each["name"]: each["params"] for each in json.loads(capsys.readouterr().out)}
    assert listed["llama-2-7b"] == 6_738_415_616


def test_config_lists_every_key_and_a_schema(capsys) -> None:
    assert run("config", "--keys") == 0
    out = capsys.readouterr().out
    for line in ("train.steps = required  # int", "parallel.ep = 1  # int", "model.preset = none"):
        assert line in out
    assert "model.groups.N.attention[mla].kv_lora_rank = required  # int\n" in out
    assert run("config", "--schema") == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_env_tells_what_a_bug_report_needs(capsys) -> None:
    assert run("env", "--ops", "--format", "json") == 0
    got = json.loads(capsys.readouterr().out)
    assert {"fathom", "python", "torch", "device", "threads", "platform"} <= set(got)
    assert {row["op"] for row in got["ops"]} >= {"attention", "grouped_mm"}
    assert run("env") == 0
    assert "torch" in capsys.readouterr().out


def test_probes_are_listed(capsys) -> None:
    assert run("probe") == 0
    assert "reach" in capsys.readouterr().out


def test_peek_shows_a_batch_of_the_bundled_text(capsys) -> None:
    assert run("data", "peek", "--rows", "2", "--seq-len", "16") == 0
    assert capsys.readouterr().out.startswith("row 0: ")


# --- A run, from its training to its text ----------------------------------------------------


def test_train_leaves_a_run_folder(trained: Path) -> None:
    for name in ("config.toml", "metrics.jsonl", "eval.jsonl", "env.json", "checkpoints"):
        assert (trained / name).exists()


def test_train_goes_on_from_its_folder_alone(trained: Path, capsys) -> None:
    assert run("train", str(trained), "train.steps=3") == 0
    assert "trained 3 steps" in capsys.readouterr().out
    assert (trained / "checkpoints" / "step-00000003").is_dir()


def test_train_refuses_another_recipe_in_the_same_folder(trained: Path, capsys) -> None:
    assert run("train", str(trained), "--train.lr", "9e-9") == 2
    assert "train.lr was 0.001 and is 9e-09" in last_line(capsys.readouterr().err)


def test_ones_own_text_is_prepared_and_never_overwritten(prepared: Path, capsys) -> None:
    ask = ["data", "prepare", str(prepared.parent), "--out", str(prepared), "--vocab-size", "300"]
    assert run(*ask) == 3
    assert "--force" in last_line(capsys.readouterr().err)
    assert run("data", "peek", str(prepared), "--rows", "1", "--seq-len", "24") == 0
    assert "note-" in capsys.readouterr().out


def test_ones_own_text_is_trained_on_and_continued(prepared: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "run")
    assert run("train", *own_run(prepared), "--out", out) == 0
    capsys.readouterr()
    assert run("eval", out, "--data", "bundled", "--max-bytes", "300", "--format", "json") == 0
    got = json.loads(capsys.readouterr().out)
    assert set(got["by_domain"]) == {"prose", "zh", "code", "maths"}
    assert got["symbols"] == {}
    assert run("generate", out, "--max-new-tokens", "3", "--prompt", "so") == 0
    assert capsys.readouterr().out.startswith("so")


def test_generate_prints_prompt_and_text(trained: Path, capsys) -> None:
    ask = ["generate", str(trained), "--prompt", "It is", "--max-new-tokens", "5"]
    assert run(*ask) == 0
    out = capsys.readouterr().out
    assert out.startswith("It is")
    assert out.endswith("\n")
    assert run(*ask, "--format", "json") == 0
    (got,) = json.loads(capsys.readouterr().out)
    assert clean(got["prompt"] + got["text"]) == out.removesuffix("\n")
    assert len(got["tokens"]) <= 5


def test_generate_takes_several_prompts(trained: Path, capsys) -> None:
    ask = ["generate", str(trained), "--prompt", "one", "--prompt", "two", "--max-new-tokens", "2"]
    assert run(*ask) == 0
    lines = capsys.readouterr().out
    assert lines.startswith("one")
    assert "\ntwo" in lines


def test_generate_gives_log_probabilities(trained: Path, capsys) -> None:
    ask = ["--prompt", "a", "--max-new-tokens", "2", "--top-logprobs", "1", "--format", "json"]
    assert run("generate", str(trained), *ask, "--frequency-penalty", "0.5") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [one["token_id"] for one in result["logprobs"]] == result["tokens"]
    assert all(len(one["top"]) == 1 and one["logprob"] < 0 for one in result["logprobs"])


def test_chat_reads_a_pipe_and_writes_answers_alone(trained: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/set max_new_tokens=3\nWho are you?\n/dance\n"))
    assert run("chat", str(trained)) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "has no chat template: it sees plain turns" in err
    assert "the answer was cut at 3 tokens" in err
    assert last_line(err) == "[error: no command is called /dance: see /help]"


def test_convert_writes_for_hugging_face_and_back(trained: Path, tmp_path: Path, capsys) -> None:
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
    assert run("convert", str(trained), theirs, "--verify") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"wrote {theirs}",
        "logits differ by at most 0, the likeliest token in 0.0% of places",
    ]
    assert err.startswith("writing theirs ")
    assert run("convert", theirs, ours, "--format", "fathom", "--dtype", "bf16") == 0
    assert str(fathom.load(ours).embed.weight.dtype) == "torch.bfloat16"
    assert run("convert", str(trained), theirs) == 2
    assert "is there already" in last_line(capsys.readouterr().err)
    assert run("convert", theirs, theirs + "-small", "--dtype", "fp8") == 0
    assert run("convert", theirs, ours, "--format", "fathom", "--dtype", "fp8", "--force") == 2
    assert run("size", theirs, "--format", "json") == 0
    assert run("generate", theirs, "--prompt", "It", "--max-new-tokens", "3") == 0


def test_fetch_lists_models_and_a_name_says_when_it_is_not_there(
    capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run("fetch") == 0
    assert "Apache-2.0" in capsys.readouterr().out
    assert run("generate", "smollm2-135m-instruct") == 3
    line = "error: smollm2-135m-instruct is not here yet: fathom fetch smollm2-135m-instruct"
    assert last_line(capsys.readouterr().err) == line


def test_generate_says_so_when_there_is_no_text(monkeypatch, capsys) -> None:
    from fathom.generate import Engine, Generation

    def at_once(self, prompts, **options):
        return [Generation("", [1], "eos") for _ in prompts]

    monkeypatch.setattr(Engine, "generate", at_once)
    assert run("generate", "tiny-llama") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "[no text: the first token ended it]"
    assert "weights are random" in captured.err


def test_eval_measures_each_domain(trained: Path, capsys) -> None:
    assert run("eval", str(trained), "--max-bytes", "500", "--format", "json") == 0
    got = json.loads(capsys.readouterr().out)
    assert got["data"] == "bundled"
    assert set(got["by_domain"]) == {"prose", "zh", "code", "maths"}
    assert sum(got["by_domain"].values()) / 4 == pytest.approx(got["val_bpb"])
    assert list(got["by_place"]) == ["0", "4", "8", "16"]
    assert run("eval", str(trained), "--max-bytes", "500") == 0
    assert "bits per symbol" in capsys.readouterr().out


def test_eval_reads_files_of_text(trained: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note.txt").write_text("It is a truth. " * 9)
    (tmp_path / "one.txt").write_text("Universally. " * 9)
    for source, domain in ((tmp_path, "mine"), (tmp_path / "one.txt", "text")):
        assert run("eval", str(trained), "--data", str(source), "--format", "json") == 0
        got = json.loads(capsys.readouterr().out)
        assert domain in got["by_domain"]
        assert got["data"] == str(source)
    assert run("eval", str(trained), "--data", str(trained)) == 3
    assert "there is no text to read" in last_line(capsys.readouterr().err)


def test_probe_prints_a_record(trained: Path, capsys) -> None:
    assert run("probe", "routing", str(trained), "--seq-len", "256") == 0
    got = json.loads(capsys.readouterr().out)
    assert got["probe"] == "routing"
    assert got["result"]


def test_runs_lists_what_is_there(trained: Path, capsys) -> None:
    assert run("runs", str(trained.parent), "--format", "json") == 0
    (got,) = json.loads(capsys.readouterr().out)
    assert got["run"] == str(trained)
    assert got["step"] >= 2
    assert run("runs", str(trained / "checkpoints")) == 0
    assert "no runs in" in capsys.readouterr().out


def test_compare_judges_runs_that_exist(prepared: Path, tmp_path: Path, capsys) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert run("train", *own_run(prepared), "--out", one) == 0
    assert run("train", *own_run(prepared), "train.lr=1e-4", "--out", other) == 0
    capsys.readouterr()
    assert run("compare", one, other) == 0
    out = capsys.readouterr().out
    assert "bits per byte, 1 seed\n" in out
    assert "differs in train.lr" in out
    assert "unsure" in out
    assert run("compare", one, other, "--format", "json") == 0
    first, second = json.loads(capsys.readouterr().out)["arms"]
    assert first["verdict"] is None
    assert second["verdict"]["verdict"] == "unsure"
    assert run("compare", one) == 2
    assert "compare needs runs of two configs" in last_line(capsys.readouterr().err)


@pytest.mark.parametrize(("reason", "code"), [("done", 0), ("interrupted", 75), ("failed", 1)])
def test_ladder_hands_on_what_was_asked_and_how_it_ended(reason, code, monkeypatch, tmp_path):
    from fathom.ladder import run as ladder_run

    asked = {}

    def stand_in(study, out, **options):
        asked.update(study=study.name, value=study.budget.value, out=out, **options)
        return ladder_run.LadderResult(reason=reason, message="that is all")

    monkeypatch.setattr(ladder_run, "run_ladder", stand_in)
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nmodel = {preset = "tiny-llama"}\nbudget = {value = 1e6}\n'
        'arms = [{name = "only"}]\n'
    )
    study = str(tmp_path / "mine.toml")
    flags = ("--only", "only", "--add-seeds", "2", "--minutes", "1.5")
    assert run("ladder", study, *flags, "budget.value=5e5") == code
    del asked["reporter"]
    assert asked == {
        "study": "mine",
        "value": 5e5,
        "out": Path("runs/mine"),
        "dry_run": False,
        "only": ["only"],
        "add_seeds": 2,
        "jobs": None,
        "minutes": 1.5,
    }


def test_size_and_peek_read_a_run_folder(trained: Path, capsys) -> None:
    assert run("size", str(trained), "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 4
    assert run("data", "peek", str(trained), "--rows", "1") == 0
    assert capsys.readouterr().out.startswith("row 0: ")


def test_a_damaged_checkpoint_is_bad_input(trained: Path, tmp_path: Path, capsys) -> None:
    import shutil

    shutil.copytree(trained / "checkpoints" / "step-00000002", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no tensors")
    assert run("generate", str(tmp_path / "broken")) == 3
    assert "is damaged: model.safetensors" in last_line(capsys.readouterr().err)


# --- Your own parts --------------------------------------------------------------------------


def test_import_registers_a_users_part(tmp_path: Path, capsys, monkeypatch) -> None:
    from fathom.ffn import FFNS

    monkeypatch.setitem(FFNS, "doubled", None)  # so that it is gone again afterwards
    del FFNS["doubled"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "doubled_part.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Literal\n"
        "import fathom\n"
        "from fathom.ffn import DenseConfig\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Doubled(DenseConfig):\n"
        '    kind: Literal["doubled"] = "doubled"\n'
        "    def num_params(self, dim): return 2 * super().num_params(dim)\n"
        'fathom.register_ffn("doubled", Doubled)\n'
    )
    ask = ["size", "tiny-llama", "--format", "json", "groups.0.ffn.kind=doubled"]
    assert run(*ask) == 2
    assert "'dense', 'moe'" in last_line(capsys.readouterr().err)
    assert run(*ask, "--import", str(tmp_path / "doubled_part.py")) == 0
    got = json.loads(capsys.readouterr().out)
    dense = fathom.size("tiny-llama")
    assert got["params"] - dense["params"] == 4 * 3 * 128 * 384


def test_a_broken_import_names_its_error(tmp_path: Path, capsys) -> None:
    (tmp_path / "broken_part.py").write_text("import fathom\nfathom.nothing\n")
    assert run("size", "tiny-llama", "--import", str(tmp_path / "broken_part.py")) == 2
    assert "failed: AttributeError: module 'fathom' has no" in last_line(capsys.readouterr().err)


def test_an_import_named_like_a_library_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "json.py").write_text("")
    assert run("size", "tiny-llama", "--import", str(tmp_path / "json.py")) == 2
    assert "a module json is there already" in last_line(capsys.readouterr().err)


# --- What is printed -------------------------------------------------------------------------


def test_control_characters_never_reach_a_terminal() -> None:
    assert clean("a\x1b[2Jb\r\u202ec\td\n漢") == "a\ufffd[2Jb\ufffd\ufffdc\td\n漢"


def test_tables_line_up(capsys) -> None:
    show_table([("name", "n"), ("a", "1,000"), ("long name", "7")])
    assert capsys.readouterr().out == "name           n\na          1,000\nlong name      7\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1e3, "1 k"),
        (671e9, "671 G"),
        (1.23456e12, "1.23 T"),
        (-2e6, "-2 M"),
    ],
)
def test_large_numbers_are_read_at_a_glance(number: float, text: str) -> None:
    assert si(number) == text
