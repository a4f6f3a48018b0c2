"""A task that fails, or kills its worker, costs nothing but itself."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from fathom.ladder.pool import Failed, Pool, choose

TASKS = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Do:
    file: Path
    what: str
    arm: str = "a"
    key: str = "k"

    def run(self):
        if self.what == "raise":
            raise ValueError("first line\\nsecond line")
        if self.what == "stop":
            raise KeyboardInterrupt
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "leave":
            os._exit(3)
        import torch
        return {"pid": os.getpid(), "threads": torch.get_num_threads()}
"""


@pytest.fixture
def do(tmp_path, monkeypatch):
    """``do("ok", "die")``: tasks that workers can import."""
    (tmp_path / "pool_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("pool_tasks")
    yield lambda *whats: [
        module.Do(tmp_path / f"{i}.json", *what.split()) for i, what in enumerate(whats)
    ]
    del sys.modules["pool_tasks"]


def results(pool: Pool, tasks: list) -> dict[int, object]:
    return {int(task.file.stem): result for task, result in pool.run(tasks)}


def test_dead_and_failing_workers_cost_their_own_task_only(do):
    started = []
    with Pool(jobs=2, threads=1) as pool:
        tasks = do("ok", "die", "raise", "ok")
        found = {int(t.file.stem): result for t, result in pool.run(tasks, started.append)}
    assert started == tasks
    assert found[1] == Failed(
        "the worker process was killed by SIGKILL: out of memory, most likely"
    )
    assert found[2] == Failed("ValueError: first line")
    for index in (0, 3):
        assert found[index]["threads"] == 1
        assert json.loads(tasks[index].file.read_text()) == found[index]
    assert not tasks[1].file.exists()


def test_a_worker_stays_for_more_tasks_and_one_that_leaves_is_noticed(do):
    with Pool(jobs=1, threads=1) as pool:
        first, second = results(pool, do("ok", "ok")).values()
        (third,) = results(pool, do("ok")).values()
        assert first["pid"] == second["pid"] == third["pid"]
        assert results(pool, do("leave")) == {
            0: Failed("the worker process ended by itself with code 3")
        }


@pytest.mark.parametrize(
    ("last", "busy", "chosen"),
    [
        (None, set(), 0),
        (None, {"a"}, 2),  # nobody is at b
        ("b", {"a"}, 2),
        ("a", {"a", "b"}, 0),  # it has compiled a
        ("c", {"a", "b"}, 0),  # nothing is left but to help
    ],
)
def test_a_worker_gets_tasks_of_the_arm_that_it_has_compiled(last, busy, chosen):
    assert choose(["a", "a", "b", "b"], last=last, busy=busy) == chosen


def test_two_workers_begin_with_an_arm_each(do):
    started = []
    with Pool(jobs=2, threads=1) as pool:
        list(pool.run(do("ok a", "ok a", "ok b"), started.append))
    assert [task.arm for task in started][:2] == ["a", "b"]


@pytest.mark.parametrize("jobs", [0, 1])
def test_no_task_begins_once_the_time_is_up(do, jobs):
    with Pool(jobs=jobs, threads=1) as pool:
        assert list(pool.run(do("ok", "ok"), until=time.monotonic())) == []
        begun = pool.run(do("ok", "ok"), until=time.monotonic() + 60)
        assert len(list(begun)) == 2


def test_a_stopped_task_stops_the_ladder(do):
    with pytest.raises(KeyboardInterrupt), Pool(jobs=1, threads=1) as pool:
        results(pool, do("stop", "ok"))


def test_without_workers_tasks_run_here_in_order(do):
    with Pool(jobs=0, threads=1) as pool:
        found = results(pool, do("ok", "raise", "ok"))
        assert list(found) == [0, 1, 2]
        assert found[1] == Failed("ValueError: first line")
        with pytest.raises(KeyboardInterrupt):
            results(pool, do("stop"))


def test_a_file_of_another_key_is_not_a_finished_task(do, tmp_path: Path):
    from fathom.ladder.task import finished, perform

    (task,) = do("ok")
    assert finished(task) is None
    assert perform(task) == finished(task)
    task.file.write_text('{"key": "another"}')
    assert finished(task) is None
    task.file.write_text('{"key": "k"')
    assert finished(task) is None
