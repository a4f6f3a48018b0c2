"""A conversation: what the model sees, what is kept, commands, and what happens at the borders."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.generate import Engine
from fathom.generate import chat as module
from fathom.generate.chat import Chat, read_message, talk, template_of
from fathom.generate.chat_template import PLAIN_TEMPLATE, ChatTemplate
from fathom.generate.defaults import Settings
from fathom.generate.engine import Generation
from fathom.model import build_model
from fathom.presets import preset

TOKENIZER = Tokenizer.load(BUNDLED / "tokenizer-1k.json")
TEMPLATE = ChatTemplate("in place of one")


@pytest.fixture(autouse=True)
def _turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates are tested elsewhere: here, no process is started for one."""

    def render(source: str, variables: dict) -> str:
        turns = [f"{m['role'][0]}:{m['content']}\n" for m in variables["messages"]]
        return "".join([*turns, "a:"])

    monkeypatch.setattr("fathom.generate.chat_template.render", render)


class Parrot:
    """A stand-in for an engine: keeps what it was asked, and says what it was told to say."""

    def __init__(self, *answers: str, context: int = 1000) -> None:
        self.model = SimpleNamespace(cfg=SimpleNamespace(max_seq_len=context))
        self.tokenizer, self.defaults = TOKENIZER, Settings(temperature=0.5)
        self.answers, self.prompts, self.requests = list(answers), [], []
        self.interrupt = False

    def generate(self, prompts, *, stream, **request) -> list[Generation]:
        (prompt,) = prompts
        self.prompts.append(TOKENIZER.decode(prompt))
        self.requests.append(request)
        text = self.answers.pop(0)
        tokens = TOKENIZER.encode(text)[: request["max_new_tokens"]]
        for token in tokens:
            stream(0, TOKENIZER.decode([token]))
            if self.interrupt:
                raise KeyboardInterrupt
        whole = len(TOKENIZER.encode(text)) < request["max_new_tokens"]
        return [Generation(text, tokens, "eos" if whole else "length")]


def chat_of(parrot: Parrot, **options) -> tuple[Chat, list[str]]:
    told: list[str] = []
    return Chat(parrot, TEMPLATE, warn=told.append, **options), told  # pyright: ignore


def run(chat: Chat, *lines: str | type[BaseException]) -> tuple[str, list[str]]:
    """What ``talk`` writes and notes for these lines."""
    rest: Iterator = iter(lines)
    written: list[str] = []
    notes: list[str] = []

    def read() -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chat.warn = notes.append
    talk(chat, read, written.append, notes.append)
    return "".join(written), notes


def test_an_answer_sees_all_that_was_said_before() -> None:
    parrot = Parrot("Hi there", "Fine.")
    chat, _ = chat_of(parrot, system="Be brief.")
    written, notes = run(chat, "Hello", "", "How are you?")
    assert written == "Hi there\nFine.\n"
    assert notes == []
    assert parrot.prompts == [
        "s:Be brief.\nu:Hello\na:",
        "s:Be brief.\nu:Hello\na:Hi there\nu:How are you?\na:",
    ]
    assert [m["content"] for m in chat.messages] == ["Hello", "Hi there", "How are you?", "Fine."]


def test_every_answer_draws_on_its_own_and_repeats_with_its_seed() -> None:
    seeds = []
    for _ in range(2):
        parrot = Parrot("a", "b")
        run(chat_of(parrot, seed=7)[0], "x", "y")
        seeds.append([request["seed"] for request in parrot.requests])
    assert seeds[0] == seeds[1] == [7, 9]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    parrot = Parrot("one two three", "four")
    chat, _ = chat_of(parrot)
    parrot.interrupt = True
    written, notes = run(chat, "count")
    first = TOKENIZER.decode(TOKENIZER.encode("one two three")[:1])
    assert written == f"{first}\n"
    assert notes == ["stopped; what came is kept"]
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    parrot.interrupt = False
    assert run(chat, KeyboardInterrupt, "go on") == ("four\n", ["Ctrl-D or /exit ends the chat"])


def test_reset_and_system_begin_again() -> None:
    parrot = Parrot("a", "b", "c")
    chat, _ = chat_of(parrot, system="S")
    run(chat, "x", "/reset", "y", "/system T", "z")
    assert parrot.prompts == ["s:S\nu:x\na:", "s:S\nu:y\na:", "s:T\nu:z\na:"]
    run(chat, "/system")
    assert chat.system is None


def test_settings_are_changed_shown_and_given_back() -> None:
    parrot = Parrot("a", "b", "c")
    chat, _ = chat_of(parrot)
    _, notes = run(chat, "x", "/set temperature=0.7", "/set top_k = 5", "y", "/set")
    assert "temperature = 0.7" in notes[0]
    assert "top_p = none" in notes[0]
    run(chat, "/set temperature=none", "z")
    asked = [(r["temperature"], r.get("top_k"), r["max_new_tokens"]) for r in parrot.requests]
    assert asked == [(0.5, None, 512), (0.7, 5, 512), (0.5, 5, 512)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set heat=1", "no setting is called 'heat': choose from temperature, top_k"),
        ("/set temperature=warm", "temperature must be a number, got 'warm'"),
        ("/set temperature=-1", "temperature must be at least 0"),
        ("/set top_k=1.5", "top_k must be a number"),
        ("/set max_new_tokens=0", "max_new_tokens must be at least 1"),
        ("/save", "/save needs a file"),
        ("/save /nowhere/x.json", "No such file"),
        ("/dance", "no command is called /dance"),
    ],
)
def test_a_mistake_is_told_and_the_chat_goes_on(line: str, sentence: str) -> None:
    chat, _ = chat_of(Parrot("still here"))
    written, notes = run(chat, line, "hi")
    assert sentence in notes[0]
    assert written == "still here\n"
    assert chat.settings == Settings()


def test_a_conversation_is_saved_but_not_over_a_file(tmp_path: Path) -> None:
    chat, _ = chat_of(Parrot("yes"), system="S")
    path = tmp_path / "talk.json"
    _, notes = run(chat, "naïve", f"/save {path}", f"/save {path}")
    assert notes[0] == f"wrote {path}"
    assert "is there already" in notes[1]
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [m["content"] for m in saved["messages"]] == ["S", "naïve", "yes"]
    assert saved["settings"] == {"temperature": 0.5, "max_new_tokens": 512}


def test_help_lists_the_commands_and_exit_ends() -> None:
    chat, _ = chat_of(Parrot())
    _, notes = run(chat, "/help", "/exit", "never asked")
    assert all(name in notes[0] for name in ("/reset", "/system", "/set", "/save", "/exit"))
    assert chat.messages == []


def test_a_message_may_have_several_lines() -> None:
    lines = iter(['"""one', "", 'two"""', '"""x"""', '"""', "y", '"""', "z"])
    messages = [read_message(lambda: next(lines)) for _ in range(4)]
    assert messages == ["one\n\ntwo", "x", "y", "z"]


def test_the_oldest_turns_are_forgotten_in_the_open() -> None:
    word = "word " * 12
    parrot = Parrot(*[word] * 6, context=120)
    chat, _ = chat_of(parrot, system="S")
    _, notes = run(chat, "/set max_new_tokens=30", *[f"{i} {word}" for i in range(4)])
    assert any("outgrew the context of 120 tokens: its oldest 2 messages" in n for n in notes)
    assert len(chat.messages) < 8
    assert chat.messages[-2]["content"].startswith("3 ")
    for prompt, request in zip(parrot.prompts, parrot.requests, strict=True):
        assert prompt.startswith("s:S\n")
        assert len(TOKENIZER.encode(prompt)) + request["max_new_tokens"] <= 120


def test_a_message_longer_than_the_context_is_refused_and_forgotten() -> None:
    chat, _ = chat_of(Parrot("ok", context=60))
    written, notes = run(chat, "word " * 100, "short")
    assert "does not fit in the model's context of 60" in notes[0]
    assert written == "ok\n"
    assert chat.messages[0]["content"] == "short"


def test_an_answer_that_is_cut_says_why() -> None:
    long = "word " * 40
    assert "cut at 5 tokens" in run(chat_of(Parrot(long))[0], "/set max_new_tokens=5", "x")[1][-1]
    chat, _ = chat_of(Parrot(long, context=40))
    assert run(chat, "x")[1][-1] == "the context is full: the answer ends here"


def test_a_chat_of_a_real_model_streams_what_it_keeps() -> None:
    model = build_model(preset("tiny-gqa"), seed=2)
    assert template_of(model) is PLAIN_TEMPLATE
    chat = Chat(Engine(model, defaults=Settings(max_new_tokens=6)), PLAIN_TEMPLATE)
    pieces: list[str] = []
    chat.answer("Who?", pieces.append)
    assert chat.messages[1] == {"role": "assistant", "content": "".join(pieces).strip()}
    assert torch.is_grad_enabled()


def test_a_checkpoint_brings_its_template() -> None:
    model = build_model(preset("tiny-gqa"), seed=2)
    object.__setattr__(model, "origin", SimpleNamespace(files={"chat_template.jinja": b"T"}))
    assert template_of(model) == ChatTemplate("T")
    assert module.MAX_NEW_TOKENS > 64
