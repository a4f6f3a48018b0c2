"""The verbs: parse, call, print. What a verb needs it imports itself, so ``--help`` is quick.

A file per theme; this one joins them in the order of ``fathom --help``.
"""

import sys
from typing import Annotated

import typer

from fathom import __version__, console
from fathom.cli import checkpoints, data, facts, measures, training, words

app = typer.Typer(
    name="fathom",
    help="From Llama to DeepSeek, one measured step at a time.\n\nBegin with: fathom ladder demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for theme in (training, words, checkpoints, measures, facts):
    app.add_typer(theme.app)
app.add_typer(data.app, name="data")


def main(args: list[str] | None = None) -> int:
    """The command line; ``--debug`` anywhere shows the stack of an error.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage or config, 3 bad data or checkpoint, 4 stopped
        by a guard, 75 stopped and saved (run it again), 130 stopped by Ctrl-C.
    """
    return console.guarded(app, sys.argv[1:] if args is None else args)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    pass
