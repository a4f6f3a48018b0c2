"""From a conversation to token ids, by the model's own chat template.

A template is a program of a stranger: it runs in jinja2's sandbox, in a process of its own with
limits on time, memory and output. What people say is data: a name of a special token in it is
text, however it is written. The template says where BOS stands, so none is added.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fathom.convert.hf_tokenizer import TOKENIZER_CONFIG, object_in
from fathom.convert.run_folder import CheckpointError
from fathom.data.tokenizer import Tokenizer
from fathom.layers.base import require

TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 2**20
MAX_MESSAGES = 1024
CPU_SECONDS = 1.0
WALL_SECONDS = 60.0  # a loaded machine may need long to start a process
MEMORY_BYTES = 256 * 2**20
MAX_CHARS = 2**22
CHILD = Path(__file__).with_name("render_child.py")

PLAIN = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}User: {% elif message.role == 'assistant' %}Assistant: {% endif %}
{{ message.content }}

{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """How a model was taught to read a conversation.

    Args:
        source: of jinja2.
        stop: strings that end an answer, where no token does.
    """

    source: str
    stop: tuple[str, ...] = ()

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        warn: Callable[[str], None] = lambda _: None,
    ) -> list[int]:
        """The prompt that asks for the next answer.

        Args:
            messages: each with ``role`` and ``content``; what else a message has is passed on.
            add_generation_prompt: end with what an answer begins with.
            warn: told where the template wrote BOS twice; one is used.

        Raises:
            ValueError: messages that are none.
            CheckpointError: the template refuses them, cannot be read, or exceeds its limits.
        """
        check_messages(messages)
        marked = [{**m, "content": tokenizer.mark_literal(m["content"])} for m in messages]
        variables = {
            "messages": marked,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos(tokenizer),
            "eos_token": tokenizer.token_name(tokenizer.eos_id),
            "tools": None,
            "documents": None,
        }
        ids = tokenizer.encode_marked(render(self.source, variables))
        if ids[:2] == [tokenizer.bos_id] * 2:
            warn("the chat template begins with BOS twice: one is used")
            return ids[1:]
        return ids

    def _bos(self, tokenizer: Tokenizer) -> str:
        begins = tokenizer.begin_ids or self.source != PLAIN
        return tokenizer.token_name(tokenizer.bos_id) if begins else ""


PLAIN_TEMPLATE = ChatTemplate(PLAIN, stop=("\nUser:",))


def check_messages(messages: Sequence[Message]) -> None:
    """``ValueError`` unless these are messages."""
    require(
        1 <= len(messages) <= MAX_MESSAGES,
        f"a conversation must have 1 to {MAX_MESSAGES} messages, got {len(messages)}",
    )
    for place, message in enumerate(messages):
        for name in ("role", "content"):
            require(
                isinstance(message.get(name), str),
                f"messages.{place}.{name} must be a text, got {message.get(name)!r:.80}",
            )


def render(template: str, variables: Mapping[str, object]) -> str:
    """The text that a template makes of variables, which must be JSON.

    Raises:
        CheckpointError: it refuses them, cannot be read, or exceeds its limits.
    """
    limits = {"cpu_seconds": CPU_SECONDS, "memory_bytes": MEMORY_BYTES, "max_chars": MAX_CHARS}
    asked = json.dumps({"template": template, "variables": variables, "limits": limits})
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)],  # -P: no folder of ours shadows a module of theirs
            input=asked.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError("the chat template takes too long") from None
    if done.returncode < 0:
        raise CheckpointError("the chat template takes too long, or too much memory")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.decode(errors="replace").splitlines() or ["it gave nothing"])[-1]
        raise CheckpointError(f"the chat template cannot be rendered: {reason}") from None
    if "text" not in answer:
        raise CheckpointError(f"the chat template cannot be used: {answer.get('error')}")
    return answer["text"]


def read_chat_template(files: Mapping[str, bytes], source: str) -> ChatTemplate | None:
    """The template of a Hugging Face checkpoint: its own file, else its tokenizer's config.

    Args:
        files: name to content.
        source: where they lie, for messages.

    Raises:
        CheckpointError: a file that cannot be read or is no template.
    """
    if TEMPLATE in files:
        return as_template(files[TEMPLATE], f"{source}/{TEMPLATE}")
    found = object_in(files, TOKENIZER_CONFIG, source).get("chat_template")
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    label = f"chat_template in {source}/{TOKENIZER_CONFIG}"
    return None if found is None else as_template(found, label)


def as_template(content: object, source: str) -> ChatTemplate:
    """A template from a file's bytes or a field's text.

    Raises:
        CheckpointError: it is no text, or too long.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        text = None
    if not isinstance(text, str) or len(text) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{source} is no template: it must be a text of at most 1 MiB")
    return ChatTemplate(text)
