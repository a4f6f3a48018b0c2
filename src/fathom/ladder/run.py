"""The ladder: plan, train every arm and seed, measure, and write ``results.json`` and the report.

Everything is a task that leaves one file (``work.py``). Running a ladder again does what has no
file yet: that is how it goes on after a stop, and how seeds and probes are added later.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Literal

import torch

from fathom.data.dataset import Dataset, open_dataset
from fathom.ladder.about import (
    anchors,
    data_facts,
    environment_facts,
    rate_facts,
    rate_note,
    repeat_command,
)
from fathom.ladder.folder import Folder
from fathom.ladder.plan import PlannedArm, arm_differences, plan
from fathom.ladder.pool import Pool, available_cores
from fathom.ladder.report import write_report
from fathom.ladder.results import ArmOutcome, assemble
from fathom.ladder.stages import Stages
from fathom.ladder.study import Study
from fathom.ladder.task import write_json
from fathom.ladder.watch import Reporter
from fathom.probes import PROBES
from fathom.settings import ConfigError, Data, to_toml
from fathom.train.folder import locked
from fathom.train.metrics import replace_text
from fathom.train.progress import duration

Reason = Literal["done", "planned", "interrupted", "failed"]
EXIT_CODES: dict[Reason, int] = {"done": 0, "planned": 0, "interrupted": 75, "failed": 1}


@dataclass(frozen=True, kw_only=True)
class LadderResult:
    """How a ladder ended.

    Args:
        reason: ``done``; ``planned``: a dry run; ``interrupted``: run it again to go on;
            ``failed``: not one arm has a result.
        message: one sentence: what happened, where it is, how to go on.
    """

    reason: Reason
    message: str

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.reason]


def run_ladder(
    study: Study,
    out: Path,
    *,
    dry_run: bool = False,
    only: Sequence[str] = (),
    add_seeds: int = 0,
    jobs: int | None = None,
    minutes: float = math.inf,
    reporter: Reporter | None = None,
) -> LadderResult:
    """Run a study in the folder ``out``, or go on with it.

    Args:
        dry_run: plan and estimate, then stop; ``out`` is not touched.
        only: train these arms and no others; the rest keeps what it has.
        add_seeds: seeds beyond those of the study; added ones stay with the folder.
        jobs: runs at once; None: one per core on the CPU, one on a GPU. 0: in this process.
        minutes: after so many no further run begins; what is finished is measured and reported.
        reporter: told of all that happens; None: nobody is.

    Raises:
        ConfigError: a study, an arm or a folder that cannot be; nothing was written.
    """
    deadline = time.monotonic() + 60 * minutes
    reporter = reporter or Reporter()
    study = with_added_seeds(study, Folder(out), add_seeds)
    planned = plan(study)
    dataset = _checked_dataset(study, planned, only)
    try:
        with _stoppable(), _pool(planned, jobs) as pool:
            if dry_run:
                with TemporaryDirectory(prefix="fathom-plan-") as scratch:
                    stages = Stages(study, Folder(Path(scratch)), dataset, pool, reporter)
                    return _estimate(stages)
            with locked(out):
                stages = Stages(study, Folder(out), dataset, pool, reporter, deadline)
                return _run(stages, only)
    except KeyboardInterrupt:
        again = repeat_command(study, out)
        message = f"stopped; what is finished stays, go on with: {again}"
        return LadderResult(reason="interrupted", message=message)
    finally:
        reporter.close()


def with_added_seeds(study: Study, folder: Folder, add_seeds: int) -> Study:
    """The study with further seeds: as many as asked for, and those the folder already has."""
    if add_seeds < 0:
        raise ConfigError(f"--add-seeds must be at least 0, got {add_seeds}")
    after = max(study.seeds) + 1
    added = {*range(after, after + add_seeds), *folder.recorded_seeds()} - set(study.seeds)
    return replace(study, seeds=(*study.seeds, *sorted(added)))


def _checked_dataset(study: Study, planned: list[PlannedArm], only: Sequence[str]) -> Dataset:
    """The study's data; names that do not exist are refused on the way."""
    arms = [p.arm.name for p in planned]
    for name in only:
        if name not in arms:
            raise ConfigError(f"--only {name}: the study's arms are {', '.join(arms)}")
    for name in study.probes:
        if name not in PROBES:
            raise ConfigError(f"probes: no probe {name!r}; there are {', '.join(PROBES)}")
    dataset = open_dataset(planned[0].config.data)
    if all(dataset.kind(domain) != "text" for domain in dataset.domains):
        raise ConfigError("data.source has no text: arms are compared in bits per byte")
    return dataset


def _pool(planned: list[PlannedArm], jobs: int | None) -> Pool:
    """As many one-thread workers as cores; where a GPU is used, one worker with all of them."""
    names = {p.config.train.device for p in planned}
    on_gpu = "cuda" in names or ("auto" in names and torch.cuda.is_available())
    if jobs is None:
        jobs = 1 if on_gpu else available_cores()
    threads = max(available_cores() // max(jobs, 1), 1) if on_gpu else 1
    return Pool(jobs=jobs, threads=threads)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does. Outside the main thread Python takes no signals."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _estimate(stages: Stages) -> LadderResult:
    stages.estimate()
    whole = duration(stages.whole_seconds())
    message = f"nothing was trained; training and evaluating it all would take about {whole}"
    return LadderResult(reason="planned", message=message)


def _run(stages: Stages, only: Sequence[str]) -> LadderResult:
    """The whole of a ladder, in order."""
    study, folder = stages.study, stages.folder
    replace_text(folder.study, to_toml(study))
    arms = [p.arm.name for p in stages.planned if not only or p.arm.name in only]
    counted = beside(lambda: anchors(stages.dataset, folder.anchors))  # while the workers train
    stages.estimate()
    stages.sweep(arms)
    outcomes = stages.measure(stages.train(arms))
    results = assemble_results(stages, outcomes, counted.result())
    write_json(folder.results, results)
    report = write_report(folder.root)
    stages.reporter.results(results)
    failed = [arm for arm, outcome in outcomes.items() if outcome.failed is not None]
    if stages.out_of_time:
        again = repeat_command(study, folder.root)
        message = f"the time was up; {report} has what is finished, go on with: {again}"
        return LadderResult(reason="interrupted", message=message)
    if len(failed) == len(outcomes):
        message = f"every arm failed; {folder.results} says why of each"
        return LadderResult(reason="failed", message=message)
    but = f"; without a result: {', '.join(failed)}" if failed else ""
    return LadderResult(reason="done", message=f"{results['learned']['sentence']} {report}{but}")


def beside(work: Callable[[], Data]) -> Future[Data]:
    """Do something in a thread that nobody waits for when the ladder is stopped."""
    done: Future[Data] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def assemble_results(stages: Stages, outcomes: dict[str, ArmOutcome], counted: Data) -> Data:
    """``results.json`` from what the stages left behind."""
    study, folder, planned = stages.study, stages.folder, stages.planned
    tuned = bool(study.lr.rates or study.lr.sweep)
    runs = [
        folder.run(arm, seed) for arm, outcome in outcomes.items() for seed in sorted(outcome.runs)
    ]
    about = {
        "data": data_facts(planned[0].config.data, stages.dataset),
        "env": environment_facts(runs, jobs=stages.pool.jobs),
        "lr_note": rate_note(study, stages.swept, stages.sweep_seed),
        "lr": rate_facts(study, stages.swept, stages.rates),
        "anchors": counted,
        "commands": [repeat_command(study, folder.root)],
    }
    differing = arm_differences(planned, stages.rates, tuned=tuned)
    return assemble(study, planned, outcomes, differing, about=about)
