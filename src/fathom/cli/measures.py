"""Measurements of a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from fathom import console
from fathom.cli.options import Data, Device, Dtype, Form, Format, Imports, Model, SeqLen

app = typer.Typer()


@app.command("eval")
def evaluate(
    model: Model,
    data: Data = None,
    seq_len: SeqLen = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read so much of each domain.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    form: Form = Format.human,
    imports: Imports = None,
) -> None:
    """Bits per byte of any model under its own tokenizer, by domain and by place in the context.

    Of a prepared corpus the held-out texts are read, of files of text all.

    \b
    Example:
      fathom eval runs/tiny --data data/mine
      fathom eval smollm2-135m-instruct --data notes.txt
    """
    from fathom.probes import PROBES, Context
    from fathom.targets import open_data, open_model, pick
    from fathom.train.evaluate import evaluate as run

    built = open_model(model, device=pick(device), dtype=dtype)
    dataset, cfg = open_data(model, built, data, max_bytes)
    length = seq_len or cfg.seq_len
    result = run(built, dataset, seq_len=length, max_bytes=max_bytes)
    found = {"val_bpb": result.mean, "by_domain": result.by_domain, "symbols": result.symbols}
    context = Context(seq_len=length, max_bytes=max_bytes or Context(seq_len=length).max_bytes)
    places = PROBES["position"].run(built, dataset, context)
    found["by_place"] = dict(zip(places["place"], places["bits_per_byte"], strict=True))
    if form is Format.json:
        console.show_json({"model": model, "data": cfg.source, **found})
        return
    rows = [(name, f"{bits:.4f}", "bits per byte") for name, bits in result.by_domain.items()]
    rows += [(name, f"{bits:.4f}", "bits per symbol") for name, bits in result.symbols.items()]
    rows += [] if result.mean is None else [("mean", f"{result.mean:.4f}", "bits per byte")]
    rows += [
        (f"place {at} on", f"{bits:.4f}", "bits per byte") for at, bits in found["by_place"].items()
    ]
    console.show_table([("domain", "loss", "unit"), *rows])


@app.command()
def probe(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A probe; none: list.")] = None,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A run or preset.")] = None,
    data: Data = None,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Of what the probe draws.")] = 0,
    device: Device = "auto",
    imports: Imports = None,
) -> None:
    """Measure one property of a trained model; prints JSON.

    \b
    Example:
      fathom probe
      fathom probe reach runs/tiny
    """
    from fathom.probes import PROBES, Context
    from fathom.targets import open_data, open_model, pick

    if name is None or model is None:
        console.show_table(
            [("probe", "what it measures"), *((n, p.about) for n, p in PROBES.items())]
        )
        return
    if name not in PROBES:
        raise ValueError(f"no probe is called {name!r}: choose from {', '.join(PROBES)}")
    built = open_model(model, device=pick(device))
    dataset, cfg = open_data(model, built, data)
    context = Context(seq_len=seq_len or cfg.seq_len, seed=seed)
    console.show_json(
        {"probe": name, "model": model, "result": PROBES[name].run(built, dataset, context)}
    )


@app.command()
def inspect(
    model: Model,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="The text to read.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="A run's load on so many ranks instead, before and after.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="--ranks: copies of busy experts, in all.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")
    ] = Path("inspect.html"),
    layer: Annotated[int | None, typer.Option(help="From 0; else the first that selects.")] = None,
    head: Annotated[int, typer.Option(help="The head shown first, from 0.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Read so much of the text.")] = 512,
    device: Device = "auto",
    imports: Imports = None,
) -> None:
    """Draw what each query of a layer reads of your text, beside the true attention.

    With --ranks, print how evenly a run's experts would load so many ranks: as they lie, and placed
    by their loads (train.log_load=true writes those down).

    \b
    Example:
      fathom inspect runs/tiny --text notes.txt
      fathom inspect runs/tiny --ranks 4 --replicas 4
      fathom inspect tiny-moba --text notes.txt --layer 2 --out moba.html
    """
    from fathom.generate.engine import missing_tokenizer, tokenizer_of
    from fathom.inspect import look, write_page
    from fathom.targets import open_model, pick

    if ranks is not None:
        from fathom.inspect.ranks import drawn, rank_loads

        for found in rank_loads(Path(model), ranks, replicas=replicas):
            typer.echo(f"MoE layer {found.layer}  as they lie  {drawn(found.before)}")
            typer.echo(f"{'':11}  placed       {drawn(found.after)}")
        return
    if text is None:
        raise ValueError(
            "give --text FILE to see what is read of it, or --ranks N for a run's load"
        )
    words = text.read_text(encoding="utf-8", errors="replace")
    built = open_model(model, device=pick(device))
    tokenizer = tokenizer_of(built)
    if tokenizer is None:
        raise missing_tokenizer(built)
    found = look(built, tokenizer, words, layer=layer, max_tokens=max_tokens)
    typer.echo(f"wrote {write_page(found, out, title=model, head=head)}")
