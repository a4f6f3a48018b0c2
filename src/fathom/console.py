"""What the command line shares: settings among the arguments, tables, and the one error border.

Imports nothing heavy: ``--help`` passes through here.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from fathom.sizing import Size
    from fathom.sizing.parallel import ParallelSize

UsageError: type[Any] = typer.BadParameter.__bases__[0]  # click's, wherever typer keeps it
SETTING = re.compile(r"([a-z_]\w*(?:\.[\w*-]+)*)=(.*)", re.DOTALL)
DOTTED_OPTION = re.compile(r"--([a-z_]\w*(?:\.[\w*-]+)+)(?:=(.*))?", re.DOTALL)
FAILED, USAGE, BAD_INPUT, RUN_AGAIN, INTERRUPTED = 1, 2, 3, 75, 130
INPUT_PARTS = ("fathom.data", "fathom.convert", "fathom.ladder.recorded")  # they read files


class VerbWithSettings(TyperCommand):
    """A verb that takes config keys: ``key=value``, ``--train.steps 5`` and ``--set key=value``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the settings as the options that click knows, then parse as ever."""
        valued = {
            name
            for param in self.params
            if not getattr(param, "is_flag", False)
            for name in param.opts
            if name.startswith("-")
        }
        return super().parse_args(ctx, list(gather_settings(args, valued)))


def gather_settings(args: Iterable[str], valued: Collection[str]) -> Iterator[str]:
    """The arguments with every config key written as ``--set key=value``.

    Args:
        valued: the verb's own options that take a value, which is then left alone.
    """
    rest = iter(args)
    for arg in rest:
        dotted, setting = DOTTED_OPTION.fullmatch(arg), SETTING.fullmatch(arg)
        if arg in valued:
            yield from [arg, *([value] if (value := next(rest, None)) is not None else [])]
        elif dotted is not None:
            value = next(rest, None) if dotted[2] is None else dotted[2]
            if value is None:
                raise UsageError(f"{arg} needs a value: {arg} VALUE, or {dotted[1]}=VALUE")
            yield from ["--set", f"{dotted[1]}={value}"]
        elif setting is not None:
            yield from ["--set", arg]
        else:
            yield arg


def import_file(path: Path) -> None:
    """Run a user's Python file, for what it registers. Its folder joins ``sys.path``.

    So processes started later (a ladder's workers) find it too.
    """
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"--import {path}: there is no such Python file")
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        raise UsageError(f"--import {path} failed: {type(error).__name__}: {error}") from error
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise UsageError(f"--import {path}: a module {path.stem} is there already; rename the file")


def clean(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def note(sentence: str) -> None:
    """To people, beside what a verb gives out."""
    typer.echo(f"[{clean(sentence)}]" if "\n" not in sentence else clean(sentence), err=True)


def line_reader(greeting: str) -> Callable[[], str]:
    """Lines of standard input: with a greeting, a prompt and editing on a terminal alone."""
    if not sys.stdin.isatty():
        return input
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  input() edits with it
    note(greeting)
    return lambda: input("> ")


def show_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def show_table(rows: Sequence[Sequence[object]]) -> None:
    """Columns side by side; the first row is the head, numbers stand to the right."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(re.match(r"[-\d.]|$", cell) for cell in column[1:]) for column in columns]
    for row in cells:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        typer.echo("  ".join(parts).rstrip())


def show_pairs(pairs: Mapping[str, object]) -> None:
    """A name and a value per line."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        typer.echo(f"{name:<{width}}  {clean(str(value))}")


def si(number: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.25 G, 70.3 k."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def brief(value: object) -> str:
    """A figure for a table; a dash where there is none."""
    if value is None:
        return "-"
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def size_lines(size: "Size") -> dict[str, str]:
    """What ``fathom size`` says to people."""
    memory, rope = size["memory"], size["rope"]
    at = f"at {size['seq_len']:,} tokens"
    lines = {
        "parameters": f"{size['params']:,}",
        "active parameters": f"{size['active_params']:,}",
        "MTP parameters": f"{size['mtp_params']:,}",
        "layers": f"{size['layers']}",
        "FLOPs per token": f"{si(size['flops_per_token'])} forward {at}, "
        f"{si(size['flops_per_token_causal'])} with only the keys a token sees",
        "cache": f"{size['cache_bytes_per_token']:,} bytes per token, "
        f"{si(size['cache_bytes'], 'B')} {at} ({size['cache_dtype']})",
        "to run": f"{si(memory['run'], 'B')}: weights {si(memory['weights'], 'B')} and cache",
        "to train": f"about {si(memory['train'], 'B')} with one sequence of that length",
    }
    if rope is not None:
        lines["RoPE"] = (
            f"theta {rope['theta']:,.0f}, longest wavelength {rope['longest_wavelength']:,.0f} "
            f"tokens, half of it {rope['half_wavelength']:,.0f}"
        )
        lines["RoPE, scaled"] = (
            f"longest wavelength {rope['scaled_longest_wavelength']:,.0f}, half "
            f"{rope['scaled_half_wavelength']:,.0f}; {rope['unfinished_pairs']} of {rope['pairs']} "
            f"pairs do not complete a turn in {rope['trained_len']:,} tokens"
        )
    return lines | ({} if size["parallel"] is None else parallel_lines(size["parallel"]))


def parallel_lines(size: "ParallelSize") -> dict[str, str]:
    """What ``fathom size --parallel`` says of each rank."""
    memory, wire = size["memory"], size["wire"]
    return {
        "ranks": f"{size['ranks']:,}: dp {size['dp']}, ep {size['ep']}, shard {size['shard']}",
        "a rank holds": f"{size['params_per_rank']:,} parameters, "
        f"{size['experts_per_rank']} experts of each MoE layer",
        "a rank's memory": f"about {si(memory['total'], 'B')} to train: " + _parts(dict(memory)),
        "a rank sends": f"{si(wire['total'], 'B')} a step of one sequence: " + _parts(dict(wire)),
    }


def _parts(sizes: Mapping[str, Any]) -> str:
    """All that is not nothing, without the total."""
    return ", ".join(f"{k} {si(v, 'B')}" for k, v in sizes.items() if k != "total" and v)


def versions() -> dict[str, str | None]:
    """Of the libraries that matter to a bug report."""
    found: dict[str, str | None] = {}
    for name in ("numpy", "safetensors", "tokenizers", "pydantic", "typer", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


class Progress:
    """A line per stage of long work over bytes: rewritten on a terminal, else written once."""

    def __init__(self) -> None:
        self._live, self._stage, self._begun = sys.stderr.isatty(), "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage, self._begun = stage, time.monotonic()
            if not self._live:
                typer.echo(f"{stage} {si(total, 'B')}", err=True)
        if self._live:
            rate = done / max(time.monotonic() - self._begun, 1e-3)
            share = done / max(total, 1)
            line = f"\r{stage} {share:4.0%} of {si(total, 'B')}, {si(rate, 'B')}/s  "
            typer.echo(line, nl=False, err=True)

    def close(self) -> None:
        if self._live and self._stage:
            typer.echo(err=True)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A :class:`Progress` that leaves its line when the work is done or has failed."""
    bar = Progress()
    try:
        yield bar
    finally:
        bar.close()


def guarded(app: typer.Typer, args: list[str]) -> int:
    """Run the command line; returns the exit code. A user's mistake shows no traceback."""
    debug = "--debug" in args
    try:
        rest = [arg for arg in args if arg != "--debug"]
        code = app(rest, prog_name="fathom", standalone_mode=False)
        if code == INTERRUPTED:  # typer has swallowed the Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return say("stopped by Ctrl-C", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return explain(error)


def explain(error: BaseException) -> int:
    """Print one line for an error, and return its exit code."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error).strip() or type(error).__name__
    if isinstance(error, UsageError):
        return _usage(error)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if "ConfigError" in names:
        return say(text, USAGE)
    if "CheckpointError" in names:
        return say(text, BAD_INPUT)
    if "Interrupted" in names:
        return say(text, RUN_AGAIN)
    if isinstance(error, ValueError):
        return say(text, BAD_INPUT if comes_from(error.__traceback__, INPUT_PARTS) else USAGE)
    if "OutOfMemoryError" in names or isinstance(error, MemoryError) or "allocate memory" in text:
        first = text.splitlines()[0]
        return say(f"{first}\nout of memory: lower train.micro_batch_size or data.seq_len", FAILED)
    if isinstance(error, OSError | RuntimeError):
        return say(text, FAILED)
    text = f"{type(error).__name__}: {text}"
    return say(
        f"{text}\nthis is a bug in fathom: see it with --debug, report it with the output "
        "of fathom env",
        FAILED,
    )


def _usage(error: Any) -> int:
    where = getattr(error, "ctx", None)
    hint = f"; see {where.command_path} --help" if where is not None else ""
    return say(f"{error.format_message().rstrip('.')}{hint}", USAGE)


def comes_from(trace: TracebackType | None, parts: Collection[str]) -> bool:
    """Whether an error passed through a module of one of these packages."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    return any(f"{module}.".startswith(f"{part}.") for module in modules for part in parts)


def say(sentence: str, code: int) -> int:
    """The last words of a command that failed; of several ranks each says which it is."""
    who = f"rank {rank()}: " if "RANK" in os.environ else ""
    typer.echo(f"{who}error: {sentence}", err=True)
    return code


def rank() -> int:
    """The place of this process among those of its run."""
    return int(os.environ.get("RANK", "0"))
