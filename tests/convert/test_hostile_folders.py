"""Folders of a stranger: refused in one sentence, and nothing is run, written or sent meanwhile."""

import contextlib
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fathom
from fathom.convert.families import read_config
from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import INDEX, SINGLE
from peers import LLAMA, V3

Spoil = Callable[[Path], object]
RAN = "fathom_ran_a_strangers_code"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a folder that can be loaded."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    fathom.save(fathom.build(read_cfg(LLAMA)), folder, format="hf")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_cfg(config: dict[str, Any]) -> fathom.ModelConfig:
    return read_config(config, "config.json")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    for name, content in whole.items():
        (made / name).write_bytes(content)
    return made


class Evil:
    """A pickle that would set a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{RAN!r}] = '1'",)


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def content(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data)


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def index(file: str) -> Spoil:
    def spoil(folder: Path) -> None:
        names = load_file(folder / SINGLE)
        (folder / SINGLE).rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return spoil


def header(text: bytes, length: int | None = None) -> Spoil:
    packed = struct.pack("<Q", len(text) if length is None else length)
    return content(SINGLE, packed + text)


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def only(name: str, data: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(data)

    return spoil


def tensor(name: str, value: torch.Tensor) -> Spoil:
    def spoil(folder: Path) -> None:
        save_file({**load_file(folder / SINGLE), name: value}, folder / SINGLE)

    return spoil


def cut(size: int) -> Spoil:
    return lambda folder: os.truncate(folder / SINGLE, size)


HOSTILE: dict[str, Spoil] = {
    "pickle for weights": only("pytorch_model.bin", pickle.dumps(Evil())),
    "pickle named safetensors": content(SINGLE, pickle.dumps(Evil())),
    "config that is a pickle": content("config.json", pickle.dumps(Evil())),
    "index to the parent": index("../outside.safetensors"),
    "index to an absolute path": index("/etc/passwd"),
    "index to a device": index("/dev/zero"),
    "index to itself": index(INDEX),
    "index to a link": lambda folder: [
        index("inside.safetensors")(folder),
        link("inside.safetensors", "../outside.safetensors")(folder),
    ],
    "weights that are a link": link(SINGLE, "/dev/zero"),
    "weights that are a pipe": pipe(SINGLE),
    "config that is a link": link("config.json", "/etc/passwd"),
    "config that is a device": link("config.json", "/dev/zero"),
    "config that is a pipe": pipe("config.json"),
    "card that is a link": link("README.md", "/etc/passwd"),
    "tokenizer that is a device": link("tokenizer.json", "/dev/zero"),
    "vocabulary that is a device": link("tiktoken.model", "/dev/zero"),
    "no config keys": content("config.json", b"{}"),
    "deep config": content("config.json", b'{"a":' * 100_000),
    "large config": content("config.json", b'{"a": "' + b"x" * 2**21 + b'"}'),
    "config twice": content("config.json", b'{"model_type": "llama", "model_type": "llama"}'),
    "a whole model of layers": config(num_hidden_layers=1000),
    "more layers than can be": config(num_hidden_layers=10**9),
    "a vast vocabulary": config(vocab_size=2**20, hidden_size=2**16),
    "vast heads": config(num_attention_heads=4096, num_key_value_heads=4096, head_dim=2**16),
    "no width": config(hidden_size=0),
    "a negative width": config(hidden_size=-32),
    "a width that is a text": config(hidden_size="32"),
    "infinite rope": config(rope_theta=1e999, rope_parameters=None),
    "hook into transformers": config(model_type="../../evil"),
    "experts without end": config(
        **{**V3, "num_hidden_layers": 1000, "n_routed_experts": 4096, "n_group": 1}
    ),
    "other activation": config(hidden_act="__import__('os').system('true')"),
    "a value that writes to the terminal": config(hidden_act="\x1b[2J\n\x07"),
    "a key that writes to the terminal": config(rope_scaling={"type": "linear", "\x1b[2J\n": 1}),
    "a tensor that writes to the terminal": tensor("\x1b[2J\n", torch.ones(1)),
    "int4": config(quantization_config={"quant_method": "gptq"}),
    "header beyond the file": header(b"{}", 2**62),
    "header without end": header(b'{"a":' * 10_000),
    "header of gigabytes": header(b"{}", 2**31),
    "cut header": cut(100),
    "cut tensors": cut(20_000),
    "empty weights": cut(0),
    "a tensor of 2^58 numbers": header(
        b'{"a":{"dtype":"U8","shape":[288230376151711744],"data_offsets":[0,288230376151711744]}}'
    ),
    "one tensor more": tensor("model.more.weight", torch.ones(1)),
    "one tensor wider": tensor("model.norm.weight", torch.ones(33)),
    "one tensor of whole numbers": tensor("model.norm.weight", torch.ones(32, dtype=torch.int32)),
    "one tensor empty": tensor("model.norm.weight", torch.ones(0)),
    "pickle beside an index that names it": lambda folder: [
        only("model.bin", pickle.dumps(Evil()))(folder),
        content(INDEX, b'{"weight_map": {"a": "model.bin"}}')(folder),
    ],
    "zip of a pickle for weights": only("model.pt", b"PK\x03\x04" + pickle.dumps(Evil())),
    "zip for weights": content(SINGLE, b"PK\x05\x06" + bytes(18)),
    "index that is a device": lambda folder: [
        only("x", b"")(folder),
        link(INDEX, "/dev/zero")(folder),
    ],
    "index that is a pipe": lambda folder: [
        index("a.safetensors")(folder),
        pipe(INDEX)(folder),
    ],
    "index of a folder": lambda folder: [
        index("a.safetensors")(folder),
        (folder / "a.safetensors").mkdir(),
    ],
    "index with a null character": index("a\0.safetensors"),
    "index to a file of another disk": index("C:\\a.safetensors"),
    "index of ten thousand files": lambda folder: [
        index("a.safetensors")(folder),
        content(
            INDEX,
            json.dumps(
                {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(10_000)}}
            ).encode(),
        )(folder),
    ],
    "index that is a list": lambda folder: [
        index("a.safetensors")(folder),
        content(INDEX, b"[]")(folder),
    ],
    "weights that are a folder": lambda folder: [
        (folder / SINGLE).unlink(),
        (folder / SINGLE).mkdir(),
    ],
    "config that is a folder": lambda folder: [
        (folder / "config.json").unlink(),
        (folder / "config.json").mkdir(),
    ],
    "config in another encoding": content(
        "config.json", '{"model_type": "llama"}'.encode("utf-16")
    ),
    "config that is not a number": config(rms_norm_eps=float("nan")),
    "config of a language in pictures": config(
        text_config={"model_type": "evil"}, hidden_size=None
    ),
    "a context without end": config(max_position_embeddings=2**62),
}

UNREADABLE_TOKENIZERS: dict[str, Spoil] = {
    "tokenizer that is no JSON": content("tokenizer.json", b"\xff\xfe"),
    "tokenizer that panics": content(
        "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "Unigram", "vocab": [], "unk_id": 7}}',
    ),
    "vocabulary that is a pickle": lambda folder: [
        (folder / "tokenizer.json").unlink(missing_ok=True),
        (folder / "tokenizer.model").write_bytes(pickle.dumps(Evil())),
    ],
    "vocabulary of one endless token": lambda folder: [
        (folder / "tokenizer.json").unlink(missing_ok=True),
        (folder / "tokenizer.model").write_bytes(b"QUFB" * 2**20 + b" 0\n"),
    ],
    "tokenizer config that is deep": content("tokenizer_config.json", b"[" * 100_000),
}

WATCHED = ("subprocess.", "os.", "socket.", "shutil.", "urllib.", "ctypes.", "open", "import")
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
watching: list[str] | None = None


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be removed: it writes down what happens while it is asked to."""
    if watching is None or not event.startswith(WATCHED) or event in HARMLESS:
        return
    if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if event == "import" and str(args[0]).split(".")[0] in sys.stdlib_module_names | {"torch"}:
        return
    watching.append(f"{event} {args}")


@pytest.fixture(scope="module")
def hook() -> None:
    sys.addaudithook(watch)


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Nothing is run, written or sent meanwhile."""
    global watching
    watching = []
    try:
        yield
    finally:
        seen, watching = watching, None
    assert seen == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_and_does_nothing(folder, case, hook):
    HOSTILE[case](folder)
    before = sorted(os.listdir(folder))
    with unmoved(), pytest.raises(CheckpointError) as refusal:
        fathom.load(folder)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1000
    assert sorted(os.listdir(folder)) == before
    assert RAN not in os.environ


@pytest.mark.parametrize("case", UNREADABLE_TOKENIZERS)
def test_a_hostile_tokenizer_is_left_out_and_does_nothing(folder, case, hook):
    UNREADABLE_TOKENIZERS[case](folder)
    with unmoved():
        model = fathom.load(folder)
    assert model.tokenizer is None


def test_there_are_sixty_hostile_folders():
    assert len(HOSTILE) + len(UNREADABLE_TOKENIZERS) >= 60


def test_the_folder_that_was_spoilt_can_be_loaded(folder):
    assert fathom.load(folder).cfg == read_cfg(LLAMA)


def test_the_watch_sees_what_it_should(tmp_path, hook):
    global watching
    watching = []
    try:
        (tmp_path / "new").write_text("x")
        os.system("true")
    finally:
        seen, watching = watching, None
    assert [line.split()[0] for line in seen] == ["open", "os.system"]
