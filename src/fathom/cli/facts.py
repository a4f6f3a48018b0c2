"""What a config or this machine is, with no model built."""

from pathlib import Path
from typing import Annotated

import typer

from fathom import console
from fathom.cli.options import (
    Form,
    Format,
    Imports,
    SeqLen,
    Settings,
)

app = typer.Typer()


@app.command(cls=console.VerbWithSettings)
def size(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, config or run folder.")],
    seq_len: SeqLen = None,
    cache_dtype: Annotated[str, typer.Option(help="Of the cache and of the weights.")] = "bfloat16",
    parallel: Annotated[
        str | None, typer.Option(metavar="dp=4,ep=8", help="A layout to train in, per rank.")
    ] = None,
    form: Form = Format.human,
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Parameters, FLOPs, cache, memory and the reach of RoPE, from the config alone.

    \b
    Example:
      fathom size deepseek-v3 --seq-len 131072
      fathom size llama-3-8b groups.0.attention.n_kv_heads=32
      fathom size deepseek-v3 --parallel dp=8,ep=64,shard=512
    """
    from fathom import settings as mechanism
    from fathom.api import resolve
    from fathom.config import ParallelConfig
    from fathom.sizing import size as sizes

    layout = None
    if parallel is not None:
        layout = mechanism.parse(ParallelConfig, mechanism.override({}, parallel.split(",")))
    result = sizes(
        resolve(model, settings or ()), seq_len=seq_len, cache_dtype=cache_dtype, parallel=layout
    )
    if form is Format.json:
        console.show_json(result)
    else:
        console.show_pairs(console.size_lines(result))


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A preset or a size.")] = None,
    form: Form = Format.human,
) -> None:
    """List the presets, or print one with every value.

    \b
    Example:
      fathom presets
      fathom presets deepseek-150m
    """
    import tomli_w

    from fathom.presets import PRESETS, preset
    from fathom.settings import to_data
    from fathom.sizing import size as sizes

    if name is not None:
        cfg = preset(name)
        data = {"model": to_data(cfg)}
        console.show_json(data) if form is Format.json else typer.echo(tomli_w.dumps(data))
        return
    found = {each: sizes(preset(each), seq_len=1) for each in PRESETS}
    if form is Format.json:
        console.show_json([{"name": each, **one} for each, one in found.items()])
        return
    head = ("preset", "parameters", "active", "layers", "cache bytes/token")
    rows = [
        (
            each,
            f"{s['params']:,}",
            f"{s['active_params']:,}",
            s["layers"],
            f"{s['cache_bytes_per_token']:,}",
        )
        for each, s in found.items()
    ]
    console.show_table([head, *rows])
    typer.echo("Any size on the dial works too: llama-35m, deepseek-1.5b.")


@app.command(cls=console.VerbWithSettings)
def config(
    source: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A run's TOML to resolve.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Every key, its type and default.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema, for editors.")] = False,
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Print a run's config with every value resolved; or every key there is.

    \b
    Example:
      fathom config configs/tiny.toml train.lr=2e-3
      fathom config --keys
    """
    from fathom import settings as mechanism
    from fathom.train.config import RunConfig, read_run_config

    if keys:
        typer.echo("model.preset = none  # name of a preset to start from")
        for key, kind, default in mechanism.keys(RunConfig):
            typer.echo(f"{key} = {default}  # {kind}")
    elif schema:
        console.show_json(mechanism.json_schema(RunConfig))
    else:
        typer.echo(mechanism.to_toml(read_run_config(source or {}, settings or ())))


@app.command()
def env(
    ops: Annotated[bool, typer.Option("--ops", help="Which implementation runs, and why.")] = False,
    form: Form = Format.human,
) -> None:
    """Versions, device and threads, for bug reports.

    \b
    Example:
      fathom env --ops
    """
    from fathom.ops import table
    from fathom.targets import pick
    from fathom.train.device import environment

    found = {**environment(pick("auto")), **console.versions()}
    rows = [row._asdict() for row in table()] if ops else []
    if form is Format.json:
        console.show_json({**found, **({"ops": rows} if ops else {})})
        return
    console.show_pairs(found)
    if ops:
        typer.echo()
        console.show_table([list(rows[0]), *(list(row.values()) for row in rows)])
