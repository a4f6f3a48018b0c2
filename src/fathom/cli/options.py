"""Options that several verbs take, as types."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
