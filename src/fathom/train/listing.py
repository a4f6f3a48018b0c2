"""What ran: how far, whether it still runs, and whether its newest checkpoint is whole."""

from pathlib import Path
from typing import Literal, TypedDict

from fathom.convert.run_folder import CONFIG, CheckpointError, committed, step_of, verify
from fathom.settings import ConfigError, read_toml
from fathom.train.folder import locked
from fathom.train.metrics import read_lines

State = Literal["running", "done", "stopped"]


class Listed(TypedDict):
    """A run. Its ``checkpoint`` is the step of the newest one; ``whole``: whether that verifies."""

    run: str
    state: State
    step: int | None
    steps: int | None
    tokens: int | None
    loss: float | None
    val_bpb: float | None
    checkpoint: int | None
    whole: bool | None


def list_runs(folder: Path) -> list[Listed]:
    """Every run at or below ``folder``, by path. Reads every newest checkpoint once, whole."""
    return [_listed(path.parent) for path in sorted(folder.rglob("metrics.jsonl"))]


def _listed(run: Path) -> Listed:
    lines, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    last = lines[-1] if lines else {}
    steps, saved = _steps(run), committed(run)
    return Listed(
        run=str(run),
        state=_state(run, done=steps is not None and last.get("step") == steps),
        step=last.get("step"),
        steps=steps,
        tokens=last.get("tokens"),
        loss=last.get("loss"),
        val_bpb=evaluations[-1]["val_bpb"] if evaluations else None,
        checkpoint=step_of(saved[-1]) if saved else None,
        whole=_is_whole(saved[-1]) if saved else None,
    )


def _steps(run: Path) -> int | None:
    try:
        return read_toml(run / CONFIG).get("train", {}).get("steps")
    except ConfigError:
        return None


def _state(run: Path, *, done: bool) -> State:
    try:
        with locked(run):
            return "done" if done else "stopped"
    except ValueError:
        return "running"


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
        return True
    except CheckpointError:
        return False
