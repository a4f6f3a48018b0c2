"""Studies and runs: train, compare, list."""

import math
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fathom import console
from fathom.cli.options import (
    Form,
    Format,
    Imports,
    Out,
    Settings,
)

if TYPE_CHECKING:
    from fathom.data.tokenizer import Tokenizer
    from fathom.model import Decoder

app = typer.Typer()


@app.command(cls=console.VerbWithSettings)
def ladder(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="A built-in study or TOML.")
    ] = "demo",
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, print, stop.")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="List the built-in studies.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Train this arm and no others.")] = None,
    add_seeds: Annotated[int, typer.Option(help="Train so many more seeds of every arm.")] = 0,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; 0: in this process.")] = None,
    minutes: Annotated[
        float,
        typer.Option(min=0, help="Begin no further run after so many; report what is finished."),
    ] = math.inf,
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Train every arm of a study at an equal budget, and write the report.

    Goes on by itself from its folder after a stop.

    \b
    Example:
      fathom ladder demo --out runs/demo
      fathom ladder my-study.toml --dry-run budget.value=2e5
    """
    from fathom.ladder.study import list_studies, load_study

    if list_them:
        console.show_table([("study", "title"), *list_studies()])
        return
    from fathom.ladder.run import run_ladder
    from fathom.ladder.watch import reporter

    loaded = load_study(study, settings or ())
    result = run_ladder(
        loaded,
        out or Path("runs") / loaded.name,
        dry_run=dry_run,
        only=only or (),
        add_seeds=add_seeds,
        jobs=jobs,
        minutes=minutes,
        reporter=reporter(),
    )
    _end(result.message, result.exit_code)


def _end(message: str, code: int) -> None:
    """The last line of a long verb; of several ranks the first says it."""
    if console.rank() == 0:
        typer.echo(message, err=code != 0)
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ladder's folder.")],
) -> None:
    """Draw report.html again from a ladder's folder.

    \b
    Example:
      fathom report runs/demo
    """
    from fathom.ladder.report import write_report

    typer.echo(write_report(folder))


@app.command(cls=console.VerbWithSettings)
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A run's TOML, or a run folder.")
    ] = None,
    out: Out = None,
    size: Annotated[
        str | None, typer.Option(help="A preset or size such as llama-35m: model.preset=SIZE.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Refuse what may differ from run to run.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A damaged newest checkpoint is an error.")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="This key may differ from the run's; may be repeated."),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to start here; several hosts: use torchrun.")
    ] = None,
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Train a model; goes on by itself from its run folder.

    \b
    Example:
      fathom train configs/tiny.toml --out runs/tiny
      fathom train configs/tiny.toml --nproc 2 parallel.ep=2
      fathom train --size llama-5m data.tokenizer=4k train.steps=200 --train.lr 2e-3
    """
    from fathom.parallel.launch import launch
    from fathom.parallel.mesh import check_world
    from fathom.train.config import read_run_config
    from fathom.train.loop import train as run
    from fathom.train.progress import reporter

    keys = [*(settings or ())]
    keys += [f"model.preset={size}"] if size else []
    keys += ["train.deterministic=true"] if deterministic else []
    folder = config if config is not None and config.is_dir() else None
    source = {} if config is None else config / "config.toml" if folder else config
    cfg = read_run_config(source, keys)
    out = out or folder or Path("runs") / (config.stem if config else size or "train")
    if nproc is not None:
        check_world(cfg.parallel, nproc)
        options = [("--set", key) for key in keys] + [("--import", path) for path in imports or ()]
        options += [("--allow-change", key) for key in allow_change or ()]
        words = [*([config] if config else []), "--out", out, *chain.from_iterable(options)]
        words += ["--strict"] if strict else []
        raise typer.Exit(launch(nproc, ["train", *map(str, words)]))
    result = run(
        cfg,
        out,
        reporter=reporter(cfg.train.log_every),
        sample=_sample,
        strict=strict,
        allow_change=allow_change or (),
    )
    _end(result.message, result.exit_code)


def _sample(model: "Decoder", tokenizer: "Tokenizer") -> str:
    """What a model in training writes by itself."""
    from fathom.generate import Engine

    length = min(64, model.cfg.max_seq_len - 1)
    (result,) = Engine(model, tokenizer).generate([""], max_new_tokens=length, temperature=0.8)
    return result.text


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders.")],
    margin: Annotated[float, typer.Option(help="Bits per byte that count as the same.")] = 0.01,
    form: Form = Format.human,
    imports: Imports = None,
) -> None:
    """A verdict on runs that exist, against the first one's config.

    Runs of one config with different seeds count as one arm; three seeds or more for a verdict.

    \b
    Example:
      fathom compare runs/gqa-1 runs/gqa-2 runs/gqa-3 runs/mla-1 runs/mla-2 runs/mla-3
    """
    from fathom.ladder.compare import compare_runs

    result = compare_runs(runs, margin=margin)
    if form is Format.json:
        console.show_json(result)
        return
    for arm in result["arms"]:
        scores, verdict = arm["val_bpb"], arm["verdict"]
        spread = f" +- {scores['std']:.4f}" if scores["std"] is not None else ""
        seeds = f"{scores['n']} seed" + ("s" if scores["n"] != 1 else "")
        typer.echo(f"{arm['name']}: {scores['mean']:.4f}{spread} bits per byte, {seeds}")
        if verdict is not None:
            typer.echo(f"  differs in {', '.join(arm['differs'])}\n  {verdict['sentence']}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look.")] = Path("runs"),
    form: Form = Format.human,
) -> None:
    """The runs in a folder: how far each is, its losses, whether its newest checkpoint is whole.

    \b
    Example:
      fathom runs runs/demo
    """
    from fathom.train.listing import list_runs

    found = list_runs(folder)
    if form is Format.json:
        console.show_json(found)
    elif not found:
        typer.echo(f"no runs in {folder}")
    else:
        rows = [[console.brief(value) for value in run.values()] for run in found]
        console.show_table([list(found[0]), *rows])


@app.command(cls=console.VerbWithSettings)
def chaos(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's TOML.")],
    out: Out = None,
    steps: Annotated[int, typer.Option(help="Of each short run.")] = 12,
    kills: Annotated[int, typer.Option(help="Of a process that only saves.")] = 100,
    flips: Annotated[int, typer.Option(help="Files to damage.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments and places.")] = 0,
    form: Form = Format.human,
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Kill, stop, cut and fill up short runs of a config, and count what was survived.

    \b
    Example:
      fathom chaos configs/tiny.toml --out /mnt/scratch/chaos
    """
    from fathom.chaos.report import chaos as run
    from fathom.train.config import read_run_config

    cfg = read_run_config(config, settings or ())
    rows = []
    for row in run(
        cfg, out or Path("runs/chaos"), steps=steps, kills=kills, flips=flips, seed=seed
    ):
        rows.append(row)
        if form is Format.human:
            console.note(f"{row.survived} of {row.tries}: {row.what}")
    failed = sum(row.tries - row.survived for row in rows)
    if form is Format.json:
        console.show_json([asdict(row) for row in rows])
    else:
        table = [(row.what, row.tries, row.survived, row.note or "-") for row in rows]
        console.show_table([("what happened", "times", "survived", "note"), *table])
    if failed:
        raise typer.Exit(console.FAILED)
