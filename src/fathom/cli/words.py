"""Words out of a model."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fathom import console
from fathom.cli.options import (
    Device,
    Dtype,
    Form,
    Format,
    Imports,
    Model,
    Seed,
    with_generation,
)

if TYPE_CHECKING:
    from fathom.generate.defaults import Settings
    from fathom.model import Decoder

app = typer.Typer()


@app.command()
@with_generation
def generate(
    model: Model,
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    settings: "Settings",
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string.")] = None,
    top_logprobs: Annotated[
        int | None, typer.Option(help="With json: log-probabilities, also of the N likeliest.")
    ] = None,
    symbols: Annotated[bool, typer.Option("--symbols", help="Image ids too.")] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    form: Form = Format.human,
    imports: Imports = None,
) -> None:
    """Continue a prompt with a trained model (or with a preset's random weights).

    What is not given is as the model's generation_config.json says, else greedy.

    \b
    Example:
      fathom generate runs/tiny --prompt "It is a truth" --temperature 0.8
    """
    from fathom.generate import Engine

    built = _ready(model, device, dtype, seed)
    prompts = prompt or [""]
    live = form is Format.human and len(prompts) == 1
    if live:
        typer.echo(console.clean(prompts[0]), nl=False)
    results = Engine(built).generate(
        prompts,
        seed=seed,
        top_logprobs=top_logprobs,
        stop=stop or (),
        symbols=symbols,
        stream=(lambda _, piece: _piece(piece)) if live else None,
        **settings,
    )
    if form is Format.json:
        pairs = zip(prompts, results, strict=True)
        console.show_json([{"prompt": text, **asdict(result)} for text, result in pairs])
        return
    for text, result in zip(prompts, results, strict=True):
        if not live:
            typer.echo(console.clean(text + result.text), nl=False)
        typer.echo("" if result.text else f" [no text: {REASONS[result.finish_reason]}]")


def _ready(model: str, device: str, dtype: str | None, seed: int) -> "Decoder":
    """The model, laid out for decoding; a preset's is said to be random."""
    from fathom.generate.layout import lay_out_for_decoding
    from fathom.targets import is_preset, open_model, pick

    with console.progress() as bar:
        built = open_model(model, device=pick(device), dtype=dtype, seed=seed, progress=bar)
    lay_out_for_decoding(built)
    if is_preset(model):
        typer.echo(f"{model} is a preset: its weights are random", err=True)
    return built


REASONS = {
    "eos": "the first token ended it",
    "stop": "it began with a stop string",
    "length": "its tokens hold none",
}


def _piece(text: str) -> None:
    typer.echo(console.clean(text), nl=False)
    sys.stdout.flush()


@app.command()
@with_generation
def chat(
    model: Model,
    *,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    settings: "Settings",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    imports: Imports = None,
) -> None:
    """Talk with a model: by its chat template, or in plain turns where it has none.

    \b
    Example:
      fathom chat smollm2-135m-instruct --system "Answer in one sentence."
      echo "Who are you?" | fathom chat smollm2-135m-instruct
    """
    from fathom.generate import Engine
    from fathom.generate.chat import Chat, talk, template_of
    from fathom.generate.chat_template import PLAIN_TEMPLATE
    from fathom.generate.defaults import check

    check(settings)
    built = _ready(model, device, dtype, seed)
    template = template_of(built)
    if template is PLAIN_TEMPLATE:
        typer.echo(f"{model} has no chat template: it sees plain turns, User: ... and", err=True)
        typer.echo("Assistant: ..., which it may not have been trained for", err=True)
    note = console.note
    conversation = Chat(
        Engine(built, defaults=settings), template, system=system, seed=seed, warn=note
    )
    talk(conversation, console.line_reader("/help for help"), _piece, note)
