"""Renders a stranger's chat template. A script: it runs alone in a process of its own.

jinja2's sandbox keeps a template from the interpreter, but not from time and memory: a template of
24 characters can ask for half a gigabyte. So this process gives itself limits before it renders,
and dies by them. It imports nothing of fathom; ``chat_template.py`` starts it.

JSON in (``template``, ``variables``, ``limits``), JSON out (``text``, or ``error``).
"""

import datetime
import json
import signal
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: the one who waits for this process limits its time alone
    resource = None


class GenerationBlock(Extension):
    """``{% generation %}`` marks what the assistant says, for training: here it means nothing."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def limit(cpu_seconds: float, memory_bytes: int) -> None:
    """From here on: so much time, then SIGPROF ends this process; so much memory in all."""
    if resource is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if sys.platform != "darwin":  # which refuses it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def environment() -> ImmutableSandboxedEnvironment:
    """As transformers makes it, so that the same template gives the same text."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def rendered(template: str, variables: dict[str, Any], max_chars: int) -> str:
    """The text, piece by piece, so that a long one is given up early."""
    pieces, size = [], 0
    for piece in environment().from_string(template).generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > max_chars:
            raise jinja2.TemplateError(f"it gives more than {max_chars:,} characters")
    return "".join(pieces)


def main() -> None:
    asked = json.load(sys.stdin)
    limits = asked["limits"]
    limit(limits["cpu_seconds"], limits["memory_bytes"])
    try:
        text = rendered(asked["template"], asked["variables"], limits["max_chars"])
        answer = json.dumps({"text": text})
    except MemoryError:
        answer = '{"error": "it needs too much memory"}'
    except Exception as error:
        answer = json.dumps({"error": f"{str(error) or type(error).__name__}"[:300]})
    sys.stdout.write(answer)


main()
