"""The parts of a ladder, each of which skips what is done: estimate, sweep, train, probe, time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fathom.data.dataset import Dataset
from fathom.ladder.folder import Folder
from fathom.ladder.plan import PlannedArm, config_hash, plan
from fathom.ladder.pool import AnyTask, Failed, Pool, available_cores
from fathom.ladder.rates import Swept, best_rate
from fathom.ladder.results import ArmOutcome
from fathom.ladder.study import Study
from fathom.ladder.task import finished, read_object, write_json
from fathom.ladder.watch import Reporter
from fathom.ladder.work import ProbeTask, SpeedTask, TrainTask, only_steps
from fathom.settings import Data
from fathom.train.config import RunConfig

ESTIMATE_STEPS, SPEED_STEPS = 2, 8
ALONE = ("speed",)  # probes that time something: they run while nothing else does
FAILED, SWEEP = "failed.json", "learning-rate sweep"
OUT_OF_TIME = "not trained: the time was up"


class Stages:
    """A study being run in its folder; call the methods in the order in which they stand.

    Attributes:
        planned: the arms.
        seconds: of one run of each arm, estimated; an arm whose step could not be timed is missing.
        rates: each arm's learning rate.
        swept: how a sweep found it; empty without one.
        refused: arms that cannot be trained at all, and why.
        deadline: when no further run begins, by ``time.monotonic``.
        out_of_time: whether one did not begin because of that.
    """

    def __init__(
        self,
        study: Study,
        folder: Folder,
        dataset: Dataset,
        pool: Pool,
        reporter: Reporter,
        deadline: float = math.inf,
    ) -> None:
        self.study, self.folder, self.dataset = study, folder, dataset
        self.pool, self.reporter, self.deadline = pool, reporter, deadline
        self.out_of_time = False
        self.planned = plan(study)
        self.seconds: dict[str, float] = {}
        self.rates = {p.arm.name: p.config.train.lr for p in self.planned} | study.lr.rates
        self.swept: dict[str, Swept] = {}
        self.refused: dict[str, str] = {}

    @property
    def sweep_seed(self) -> int:
        """A seed that no verdict uses."""
        return max(self.study.seeds) + 1

    def estimate(self) -> None:
        """Time a few steps of every arm; where wall time is held equal, give it its steps."""
        step: dict[str, float] = {}
        threads = self.pool.threads
        tasks = [self.speed_task(p, "estimate", ESTIMATE_STEPS, threads) for p in self.planned]
        for task, result in self.do(tasks, until=self.deadline):
            if isinstance(result, Failed):
                why = f"its training step cannot be timed: {result.reason}"
                self.reporter.notice(f"{task.arm}: {why}")
                if self.study.budget.hold == "wall_time":
                    self.refused[task.arm] = why
            else:
                step[task.arm] = result["step_seconds"]
        if self.study.budget.hold == "wall_time":
            self.planned = plan(self.study, step)
        for p in self.planned:
            if p.arm.name in step:
                steps = p.config.train.steps + self._evaluation_steps(p)
                self.seconds[p.arm.name] = steps * step[p.arm.name]
        self.reporter.plan(self.study, self.planned, self.seconds)

    def _evaluation_steps(self, p: PlannedArm) -> float:
        """How many training steps the evaluation takes as long as: a forward is a third of one."""
        tokens = sum(self.dataset.tokens("heldout", domain) for domain in self.dataset.domains)
        return tokens / p.config.train.tokens_per_step / 3

    def whole_seconds(self) -> float:
        """Estimated, from the start: the runs of all arms, seeds and rates of a sweep."""
        lr = self.study.lr
        runs = len(self.study.seeds) + lr.sweep_share * len(lr.sweep)
        return runs * sum(self.seconds.values()) / max(self.pool.jobs, 1)

    def sweep(self, arms: Sequence[str]) -> None:
        """Find the rates, if the study sweeps: of these arms now, of others if the folder can."""
        tasks = {p.arm.name: self._sweep_tasks(p) for p in self.planned}
        wanted = [task for p in self._trainable(arms) for task in tasks[p.arm.name]]
        results = {task.file: result for task, result in self.train_all(SWEEP, wanted)}
        for arm, its in tasks.items():
            found = [results.get(task.file) or self._known(task) for task in its]
            if any("key" not in result for result in found):  # half a sweep would give another rate
                if arm in arms:
                    self.refused[arm] = "its learning-rate sweep is not finished"
            elif its:
                self._choose(arm, its, found)

    def _sweep_tasks(self, p: PlannedArm) -> list[TrainTask]:
        lr = self.study.lr
        return [
            self.task(
                p.arm.name,
                p.sweep_config(self.sweep_seed, rate, lr.sweep_share),
                self.folder.sweep(p.arm.name, rate),
            )
            for rate in lr.sweep
        ]

    def _choose(self, arm: str, tasks: Sequence[TrainTask], found: Sequence[Data]) -> None:
        """An arm's rate from the runs of its sweep; those that diverged have none."""
        points = [
            (task.cfg.train.lr, result["val_bpb"])
            for task, result in zip(tasks, found, strict=True)
            if not result["failed"]
        ]
        if not points:
            self.refused[arm] = "no run of its learning-rate sweep finished"
            return
        self.swept[arm] = best_rate(points)
        self.rates[arm] = self.swept[arm].lr

    def train(self, arms: Sequence[str]) -> dict[str, ArmOutcome]:
        """Train these arms; every arm's outcome, the others' as the folder knows it."""
        wanted = self._tasks(self._trainable(arms))
        results = {task.file: result for task, result in self.train_all("training", wanted)}
        outcomes = {}
        for p in self.planned:
            outcome = ArmOutcome(lr=self.rates[p.arm.name])
            for task in self._tasks([p]):
                result = results.get(task.file) or self._known(task)
                if result["failed"]:
                    outcome.failures[task.cfg.train.seed] = result["failed"]
                else:
                    outcome.runs[task.cfg.train.seed] = result
            outcomes[p.arm.name] = outcome
        return outcomes

    def _known(self, task: TrainTask) -> Data:
        """What the folder says of a run that is not to be trained now."""
        failed = self.refused.get(task.arm) or "not trained: --only named other arms"
        return finished(task) or _failure(task) or {"failed": failed}

    def measure(self, outcomes: dict[str, ArmOutcome]) -> dict[str, ArmOutcome]:
        """Probe the first seed of every arm that has a result, then time it, alone."""
        there = [p for p in self.planned if outcomes[p.arm.name].failed is None]
        together = [name for name in self.study.probes if name not in ALONE]
        alone = [name for name in self.study.probes if name in ALONE]
        probes = self.probe("probes", there, together)
        timed, speeds = {}, {}
        for p in there:  # one at a time: the other workers have nothing to do
            timed |= self.probe(f"speed of {p.arm.name}", [p], alone)
            speeds |= self.time(p)
        return {
            arm: replace(
                outcome,
                probes=probes.get(arm, {}) | timed.get(arm, {}),
                speed=speeds.get(arm),
            )
            for arm, outcome in outcomes.items()
        }

    def probe(
        self, what: str, planned: Sequence[PlannedArm], names: Sequence[str]
    ) -> dict[str, Data]:
        """Each arm's answers to some probes; a run that cannot be read says why in all of them."""
        self.reporter.stage(what, None)
        found: dict[str, Data] = {}
        for task, result in self.do([self.probe_task(p, names) for p in planned if names]):
            if isinstance(result, Failed):
                found[task.arm] = {name: {"failed": result.reason} for name in names}
            else:
                found[task.arm] = result["probes"]
        return found

    def time(self, p: PlannedArm) -> dict[str, Data]:
        """The speed and memory of an arm's training step; nothing if it cannot be had."""
        task = self.speed_task(p, "speed", SPEED_STEPS, available_cores())
        ((_, result),) = self.do([task])
        if isinstance(result, Failed):
            self.reporter.notice(f"{p.arm.name}: its speed cannot be measured: {result.reason}")
            return {}
        return {p.arm.name: result}

    def task(self, arm: str, cfg: RunConfig, folder: Path) -> TrainTask:
        key = config_hash(cfg, self.dataset.fingerprint)
        return TrainTask(arm=arm, cfg=cfg, folder=folder, key=key)

    def speed_task(self, p: PlannedArm, name: str, steps: int, threads: int) -> SpeedTask:
        cfg = only_steps(p.config, steps)
        key = f"{config_hash(cfg, self.dataset.fingerprint)} {threads} threads"
        file = self.folder.of_arm(p.arm.name, name)
        return SpeedTask(arm=p.arm.name, cfg=cfg, file=file, key=key, threads=threads)

    def probe_task(self, p: PlannedArm, names: Sequence[str]) -> ProbeTask:
        """The first seed's run speaks for its arm."""
        (run,) = self._tasks([p], seeds=self.study.seeds[:1])
        alone = set(names) <= set(ALONE)
        return ProbeTask(
            arm=p.arm.name,
            cfg=run.cfg,
            folder=run.folder,
            file=self.folder.of_arm(p.arm.name, "probes-alone" if alone else "probes"),
            key=f"{run.key} {' '.join(names)}",
            probes=tuple(names),
            threads=available_cores() if alone else self.pool.threads,
        )

    def _trainable(self, arms: Sequence[str]) -> list[PlannedArm]:
        return [p for p in self.planned if p.arm.name in arms and p.arm.name not in self.refused]

    def _tasks(
        self, planned: Sequence[PlannedArm], seeds: Sequence[int] | None = None
    ) -> list[TrainTask]:
        return [
            self.task(arm, p.run_config(seed, self.rates[arm]), self.folder.run(arm, seed))
            for p in planned
            for seed in (self.study.seeds if seeds is None else seeds)
            for arm in [p.arm.name]
        ]

    def train_all(self, what: str, tasks: Sequence[TrainTask]) -> list[tuple[TrainTask, Data]]:
        """Do what is not done yet, the longest runs first; ``failed`` says why there is no loss.

        What did not begin before the deadline has no ``key``.
        """
        for task in tasks:
            notice = self.folder.set_aside(task, self.dataset.fingerprint)
            if notice:
                self.reporter.notice(notice)
        known = {task.file: result for task in tasks if (result := finished(task)) is not None}
        waiting = [task for task in tasks if task.file not in known]
        waiting.sort(key=lambda task: -self.seconds.get(task.arm, 0.0))  # stable: seeds in order
        seconds = sum(self.seconds.get(task.arm, 0.0) for task in waiting)
        for task in tasks:
            if task.file in known:
                self.reporter.finished(task, known[task.file])
        if waiting:
            self.reporter.stage(what, seconds / max(self.pool.jobs, 1))
        for task, result in self.pool.run(waiting, self.reporter.started, until=self.deadline):
            if isinstance(result, Failed):
                result = {"key": task.key, "failed": result.reason}
                write_json(task.folder / FAILED, result)
            known[task.file] = result
            self.reporter.finished(task, result)
        self.out_of_time |= any(task.file not in known for task in tasks)
        return [(task, known.get(task.file, {"failed": OUT_OF_TIME})) for task in tasks]

    def do(
        self, tasks: Sequence[AnyTask], until: float = math.inf
    ) -> Iterator[tuple[AnyTask, Data | Failed]]:
        """Do what is not done yet of some measurements."""
        waiting: list[AnyTask] = []
        for task in tasks:
            known = finished(task)
            if known is None:
                waiting.append(task)
            else:
                yield task, known
        yield from self.pool.run(waiting, until=until)


def _failure(task: TrainTask) -> Data | None:
    """Why a run failed the last time it was tried."""
    data = read_object(task.folder / FAILED)
    return data if data is not None and data.get("key") == task.key else None
