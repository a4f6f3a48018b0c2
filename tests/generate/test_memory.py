"""A conversation's cache: what is known is not read again, and the answer is the same."""

import pytest
import torch

from fathom.config import LayerGroup, ModelConfig
from fathom.ffn import DenseConfig
from fathom.generate import Engine
from fathom.generate.chat import Chat
from fathom.generate.chat_template import PLAIN_TEMPLATE
from fathom.generate.defaults import Settings
from fathom.generate.memory import Memory, can_be_cut_back
from fathom.model import Decoder, build_model
from fathom.presets import preset
from kinds import DIM, KINDS

FIRST = [5, 9, 2, 7, 1, 30, 4]


def model_of(kind: str) -> Decoder:
    group = LayerGroup(count=2, attention=KINDS[kind], ffn=DenseConfig(inter_dim=32))
    cfg = ModelConfig(vocab_size=40, dim=DIM, groups=(group,), max_seq_len=64, init_std=0.4)
    return build_model(cfg, seed=1)


class Counting:
    """How many tokens each forward of a model was given."""

    def __init__(self, model: Decoder) -> None:
        self.lengths: list[int] = []
        model.register_forward_pre_hook(lambda _, args: self.lengths.append(args[0].shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_an_engine_that_remembers_nothing(kind: str) -> None:
    model = model_of(kind)
    engine, memory = Engine(model), Memory()

    def say(prompt: list[int]) -> list[int]:
        (kept,) = engine.generate([prompt], max_new_tokens=6, memory=memory)
        (fresh,) = engine.generate([prompt], max_new_tokens=6)
        assert kept.tokens == fresh.tokens
        return kept.tokens

    second = [*FIRST, *say(FIRST), 3, 8]  # goes on
    third = [*second[:-4], 11, *say(second), 2, 2, 2]  # parts from what was read
    say(third)
    say(third[:4])  # shorter than what is known
    say(third[:4])  # wholly known
    say([1])


def test_only_what_is_new_is_read() -> None:
    model = model_of("gqa")
    engine, memory, counting = Engine(model), Memory(), Counting(model)
    (first,) = engine.generate([FIRST], max_new_tokens=4, memory=memory)
    assert counting.lengths == [len(FIRST), 1, 1, 1]
    counting.lengths.clear()
    engine.generate([[*FIRST, *first.tokens, 3]], max_new_tokens=2, memory=memory)
    assert counting.lengths == [2, 1]  # the last token of an answer was chosen, but not read
    counting.lengths.clear()
    engine.generate([[*FIRST, *first.tokens, 3, *range(20)]], max_new_tokens=2, memory=memory)
    assert counting.lengths == [len(FIRST) + 25, 1]  # it had outgrown its cache


@pytest.mark.parametrize("kind", ["gqa", "window"])
def test_what_was_interrupted_is_not_relied_on(kind: str) -> None:
    model = model_of(kind)
    memory, engine = Memory(), Engine(model)

    def stop(module: torch.nn.Module, *_: object) -> None:
        raise KeyboardInterrupt

    engine.generate([FIRST], max_new_tokens=4, memory=memory)
    handle = model.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[*FIRST[:3], 2, 2, 2, 2, 2, 2]], max_new_tokens=4, memory=memory)
    handle.remove()
    (kept,) = engine.generate([FIRST], max_new_tokens=4, memory=memory)
    assert kept == engine.generate([FIRST], max_new_tokens=4)[0]


def test_a_memory_is_of_one_conversation() -> None:
    with pytest.raises(ValueError, match="one conversation, got 2 prompts"):
        Engine(model_of("gqa")).generate([[1], [2]], max_new_tokens=2, memory=Memory())


def test_which_caches_can_be_cut_back() -> None:
    assert can_be_cut_back(model_of("gqa"))
    assert can_be_cut_back(model_of("mla"))
    assert not can_be_cut_back(model_of("window"))


def test_a_chat_reads_every_message_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(source: str, variables: dict) -> str:
        turns = [f"{m['role'][0]}:{m['content']}\n" for m in variables["messages"]]
        return "".join([*turns, "a:"])

    monkeypatch.setattr("fathom.generate.chat_template.render", render)
    model = build_model(preset("tiny-gqa"), seed=2)
    counting = Counting(model)
    chat = Chat(Engine(model, defaults=Settings(max_new_tokens=6)), PLAIN_TEMPLATE)
    prompts = []
    for question in ("Who is it that came?", "Why?"):
        prompts.append(len(chat._prompt([*chat.messages, {"role": "user", "content": question}])))
        counting.lengths.clear()
        chat.answer(question, lambda _: None)
    answered = prompts[1] - prompts[0]  # an answer may be cut into other tokens where it begins
    assert counting.lengths[0] <= answered + 2 < prompts[1]
