"""Options that several verbs take, as types."""

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom import console


class Format(StrEnum):
    human = "human"
    json = "json"


def _import(paths: list[Path] | None) -> list[Path]:
    for path in paths or ():
        console.import_file(path)
    return paths or []


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A config key; also KEY=VALUE or --KEY VALUE."),
]
Imports = Annotated[
    list[Path] | None,
    typer.Option(
        "--import", metavar="FILE.py", callback=_import, help="Your own parts to register."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write.")]
Form = Annotated[Format, typer.Option("--format", help="For people or for programs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str | None, typer.Option(help="Of the weights; as stored if not given.")]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="A prepared corpus, bundled, or files of text."),
]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Context in tokens.")]
Seed = Annotated[int, typer.Option(help="Of the draws, and of a preset's weights.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, checkpoint or preset.")]

GENERATION: dict[str, tuple[type[int] | type[float], str]] = {
    "max_new_tokens": (int, "At most so many tokens."),
    "temperature": (float, "0: always the likeliest token."),
    "top_k": (int, "Of the k likeliest tokens."),
    "top_p": (float, "Of the likeliest up to p in sum."),
    "min_p": (float, "Of those this share as likely."),
    "repetition_penalty": (float, "Above 1: against words that stand there."),
    "presence_penalty": (float, "Off each token that was written."),
    "frequency_penalty": (float, "The same, each time it was written."),
}


def with_generation(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes ``settings``, with an option for each of ``GENERATION`` in its place."""

    @wraps(command)
    def run(**given: Any) -> None:
        command(settings={name: given.pop(name) for name in GENERATION}, **given)

    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(command).parameters.values():
        if own.name != "settings":
            parameters.append(own)
            continue
        for name, (kind, text) in GENERATION.items():
            option = Annotated[kind | None, typer.Option(help=text)]
            parameters.append(inspect.Parameter(name, own.kind, default=None, annotation=option))
    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
