"""A conversation with a model: what was said, the settings, and what of it fits the context.

``Chat`` holds the conversation; ``talk`` is the loop of a terminal around it, which reads and
writes through functions it is given.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

from fathom.generate.chat_template import PLAIN_TEMPLATE, ChatTemplate, Message, read_chat_template
from fathom.generate.defaults import NUMBERS, Settings, check, length, over
from fathom.generate.engine import Engine, FinishReason, missing_tokenizer
from fathom.generate.memory import Memory
from fathom.layers.base import require
from fathom.model import Decoder

MAX_NEW_TOKENS = 512  # an answer is longer than what `generate` continues a text with
BLOCK = '"""'
HELP = """\
/reset            forget the conversation, keep the system prompt
/system TEXT      begin again under another system prompt
/set NAME=VALUE   temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                  frequency_penalty, max_new_tokens; VALUE none: as the model has it
/set              show them
/save FILE        write the conversation as JSON
/exit             end; so does Ctrl-D. Ctrl-C stops an answer.
\"\"\" begins and ends a message of several lines."""


def template_of(model: Decoder) -> ChatTemplate:
    """The chat template of the checkpoint that a model was loaded from, else the plain one."""
    origin = getattr(model, "origin", None)
    found = None if origin is None else read_chat_template(origin.files, "the checkpoint")
    return found or PLAIN_TEMPLATE


class Chat:
    """One conversation.

    Args:
        engine: of the model, with a tokenizer.
        template: how the model was taught to read a conversation.
        system: what stands before it; None: what the template itself puts there.
        seed: of the draws; every answer draws on its own.
        warn: told in a sentence what the user should know.
    """

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        *,
        system: str | None = None,
        seed: int = 0,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        if engine.tokenizer is None:
            raise missing_tokenizer(engine.model)
        self.engine, self.template, self.seed, self.warn = engine, template, seed, warn
        self.system = system
        self.messages: list[Message] = []  # without the system prompt
        self.settings = Settings()  # what was set in the conversation
        self.memory = Memory()

    @property
    def effective(self) -> Settings:
        """What the next answer is generated with."""
        return over(self.settings, self.engine.defaults, {"max_new_tokens": MAX_NEW_TOKENS})

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def set(self, name: str, value: str) -> None:
        """Change a setting; ``none`` gives it back to the model.

        Raises:
            ValueError: no such setting, or a value that cannot be.
        """
        require(name in NUMBERS, f"no setting is called {name!r}: choose from {', '.join(NUMBERS)}")
        try:
            number = None if value.lower() == "none" else NUMBERS[name](value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
        changed = over(cast(Settings, {**self.settings, name: number}))
        check(changed)
        self.settings = changed

    def save(self, path: Path) -> None:
        """Write the conversation as JSON.

        Raises:
            ValueError: there is something already.
        """
        require(not path.exists(), f"{path} is there already: name another file")
        data = {"messages": self._with_system(self.messages), "settings": self.effective}
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def answer(self, text: str, stream: Callable[[str], None]) -> FinishReason | None:
        """Ask, and stream the answer; both join the conversation.

        Returns:
            Why the answer ended; None: Ctrl-C stopped it, and what came is kept.

        Raises:
            ValueError: the question alone is longer than the context, or the template refuses it;
                the conversation stays as it was.
        """
        asked: Message = {"role": "user", "content": text}
        kept, prompt = self._fitting([*self.messages, asked])
        room = self.engine.model.cfg.max_seq_len - len(prompt)
        pieces: list[str] = []

        def take(_: int, piece: str) -> None:
            pieces.append(piece)
            stream(piece)

        reason: FinishReason | None = None
        wanted = length(self.effective)
        request = over({"max_new_tokens": min(wanted, room)}, self.effective)
        try:
            (result,) = self.engine.generate(
                [prompt],
                **request,
                seed=self.seed + len(self.messages),
                stop=self.template.stop,
                stream=take,
                memory=self.memory,
            )
            reason = result.finish_reason
        except KeyboardInterrupt:
            pass
        self.messages = [*kept, {"role": "assistant", "content": "".join(pieces).strip()}]
        if reason == "length" and room < wanted:
            self.warn("the context is full: the answer ends here")
        elif reason == "length":
            self.warn(f"the answer was cut at {wanted} tokens: /set max_new_tokens=N")
        return reason

    def _fitting(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The newest messages that leave room for an answer, and their prompt."""
        context = self.engine.model.cfg.max_seq_len
        reserved = min(length(self.effective), context // 4)
        left_out = 0
        while len(prompt := self._prompt(messages[left_out:])) + reserved > context:
            if left_out + 2 >= len(messages):
                require(
                    len(prompt) < context,
                    f"a message of {len(prompt):,} tokens does not fit in the model's context of "
                    f"{context:,}: shorten it",
                )
                break
            left_out += 2  # a question and its answer
        if left_out:
            self.warn(
                f"the conversation outgrew the context of {context:,} tokens: its oldest "
                f"{left_out} messages are forgotten"
            )
        return messages[left_out:], prompt

    def _prompt(self, messages: list[Message]) -> list[int]:
        assert self.engine.tokenizer is not None
        return self.template.ids(self.engine.tokenizer, self._with_system(messages), warn=self.warn)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        before: list[Message] = []
        if self.system is not None:
            before = [{"role": "system", "content": self.system}]
        return [*before, *messages]


def talk(
    chat: Chat,
    read: Callable[[], str],
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Read messages and commands to the end of the input, and write the answers.

    Args:
        read: the next line; ``EOFError`` at the end, ``KeyboardInterrupt`` for Ctrl-C.
        write: pieces of answers.
        note: sentences that are no answers.
    """
    while True:
        try:
            text = read_message(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("Ctrl-D or /exit ends the chat")
            continue
        try:
            if text.split(maxsplit=1)[:1] == ["/exit"]:
                return
            if text.startswith("/"):
                command(chat, text, note)
            elif text.strip():
                reason = chat.answer(text, write)
                write("\n")
                if reason is None:
                    note("stopped; what came is kept")
        except (ValueError, OSError) as error:
            note(f"error: {error}")


def read_message(read: Callable[[], str]) -> str:
    """A line, or the lines between triple quotes."""
    line = read()
    if not line.lstrip().startswith(BLOCK):
        return line
    text = line.lstrip().removeprefix(BLOCK)
    while not text.rstrip().endswith(BLOCK):
        text += "\n" + read()
    return text.rstrip().removesuffix(BLOCK).strip("\n")


def command(chat: Chat, text: str, note: Callable[[str], None]) -> None:
    """A line that begins with a slash.

    Raises:
        ValueError: no such command, or what it says cannot be.
    """
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if name == "/reset":
        chat.reset()
        note("the conversation is forgotten")
    elif name == "/system":
        chat.system = rest or None
        chat.reset()
        note("a new conversation under that system prompt" if rest else "no system prompt")
    elif name == "/set" and not rest:
        said = chat.effective
        note("\n".join(f"{each} = {said.get(each, 'none')}" for each in NUMBERS))
    elif name == "/set":
        key, _, value = rest.partition("=")
        chat.set(key.strip(), value.strip())
    elif name == "/save":
        require(rest != "", "/save needs a file: /save FILE")
        chat.save(Path(rest))
        note(f"wrote {rest}")
    elif name == "/help":
        note(HELP)
    else:
        raise ValueError(f"no command is called {name}: see /help")
