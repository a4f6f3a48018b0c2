"""The hub, spoken to on this machine alone: what is asked for, with which token, and what stays."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fathom import api
from fathom.convert import hub
from fathom.convert.fetch import located
from fathom.convert.hub import hub_folder, is_hub_name, revision_of
from fathom.convert.run_folder import CheckpointError

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = ("pytorch_model.bin", "modeling_evil.py", "original/model.safetensors", "onnx/m.json")


class Hub(BaseHTTPRequestHandler):
    """The routes that ``huggingface_hub`` uses: a model's list of files, and the files."""

    files: dict[str, bytes]
    asked: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path, self.headers.get("Authorization")))
        if path.startswith("/api/models/me/tiny"):
            names = [{"rfilename": name} for name in (*self.files, *OTHERS)]
            told = {"id": "me/tiny", "modelId": "me/tiny", "sha": COMMIT, "siblings": names}
            tree = [
                {"type": "file", "path": name, "size": len(self.files.get(name, b"")), "oid": "0"}
                for name in (*self.files, *OTHERS)
            ]
            self.send(json.dumps(tree if "/tree/" in path else told).encode(), body)
        elif path.startswith("/me/tiny/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            self.send(self.files[name], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    out = tmp_path_factory.mktemp("hub") / "tiny"
    api.save(api.build("tiny-gqa"), out, format="hf")
    Hub.files, Hub.asked = {path.name: path.read_bytes() for path in out.iterdir()}, []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def fathom(*lines: str, **variables: str) -> tuple[list[int], str, str]:
    """Run command lines in one new process, for the library reads its variables when imported."""
    code = (
        "import json, sys; from fathom.cli import main\n"
        "print(json.dumps([main(line.split()) for line in sys.argv[1:]]))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *lines],
        env={**kept, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


def test_a_model_of_the_hub_is_fetched_kept_and_named_by_its_revision(
    server: str, tmp_path: Path
) -> None:
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    short = "generate me/tiny --max-new-tokens 2 --prompt a"
    codes, _, err = fathom("size me/tiny", short, "size me/none", HF_ENDPOINT=server, **home)
    assert codes == [0, 0, 3]
    assert f"[revision {COMMIT}: pin it with me/tiny@{COMMIT}]" in err
    assert "there is no folder me/none here, and the hub does not give it" in err
    fetched = [path.split("/", 5)[5] for how, path, _ in Hub.asked if "/resolve/" in path]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(fetched)
    assert not set(fetched) & set(OTHERS)
    weights = next(i for i, asked in enumerate(Hub.asked) if "model.safetensors" in asked[1])
    configs = [i for i, asked in enumerate(Hub.asked) if "config.json" in asked[1]]
    assert configs[0] < weights
    assert all(token == "Bearer hf_secret" for _, path, token in Hub.asked)
    before = len(Hub.asked)
    codes, _, err = fathom(
        f"{short} --seed 1".replace("tiny", f"tiny@{COMMIT}"), HF_HUB_OFFLINE="1", **home
    )
    assert codes == [0], err
    assert len(Hub.asked) == before


def test_names_of_the_hub_have_one_form(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("meta-llama/Llama-3.2-1B")
    assert is_hub_name("a/b@main")
    for other in ("a", "a/b/c", "/a/b", "../b", "a/..", "a/b@", "a/b c", "./a", "C:\\a", "a/b@x/y"):
        assert not is_hub_name(other), other
    (tmp_path / "runs").mkdir()
    assert not is_hub_name("runs/tyni")
    assert located("runs/tyni") == Path("runs/tyni")
    assert not is_hub_name(Path("a/b"))


def test_without_the_library_the_sentence_says_how_to_get_it(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(CheckpointError, match=r"pip install 'fathom-lm\[hub\]'"):
        hub_folder("a/b")


def test_a_revision_is_known_by_the_layout_of_the_cache() -> None:
    assert revision_of(Path("x/models--a--b/snapshots/abc")) == "abc"
    assert revision_of(Path("runs/tiny")) is None
