"""What a sweep starts, what it leaves alone, and what it says in the end; by jobs and a launcher that are written down
here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from denoiselab.launcher import Launcher, Task
from denoiselab.sweeper import Grid
from denoiselab.sweeper.base import Options


class Made:
    """A job that is done once it was started, unless its status says otherwise."""

    def __init__(self, overrides: list[str], status: int = 0, rerun: bool = False, shared: bool = False):
        self.overrides, self.status, self.rerun = overrides, status, rerun
        self.path = Path("shared" if shared else "-".join(overrides))
        self.finished, self.error, self.aside, self.tasks = False, "", 0, 0

    def set_aside(self) -> None:
        self.aside, self.finished, self.error = self.aside + 1, False, ""

    def task(self, label: str) -> Task:
        self.tasks += 1
        return Task(label, self.overrides, self.path)


class Making:
    """Makes each job once, so that a second command meets the first one's."""

    what, was = "runs", "done before"

    def __init__(self, **options: Any):
        self.options, self.jobs, self.statuses = options, {}, {}

    def compose(self, overrides: list[str]) -> None:
        raise AssertionError

    def job(self, overrides: list[str]) -> Made:
        made = Made(overrides, self.statuses.get(" ".join(overrides), 0), **self.options)
        return self.jobs.setdefault(tuple(overrides), made)

    def check(self, jobs: Sequence[Made], overrides: Sequence[str]) -> None:
        self.checked = len(jobs)


class Instant(Launcher):
    """Every task has ended when it is asked for; what it would do is done."""

    poll_seconds = 0.0

    def __init__(self, making: Making):
        super().__init__(1)
        self.making, self.begun = making, []

    def start(self, tasks: Sequence[Task]) -> list[Made]:
        self.begun += [" ".join(task.arguments) for task in tasks]
        return [self.making.jobs[tuple(task.arguments)] for task in tasks]

    def poll(self, handle: Made) -> int:
        handle.finished = not handle.status
        handle.error = f"OSError: {handle.status}" if handle.status > 0 else ""
        return handle.status

    def stop(self, handles: Sequence[Made], signum: int) -> None:
        raise AssertionError


SWEEP = ["x=1,2", "seed=0,1", "y=5"]
EVERY = ["x=1 seed=0 y=5", "x=1 seed=1 y=5", "x=2 seed=0 y=5", "x=2 seed=1 y=5"]


def swept(making: Making, **options: Any) -> tuple[int, list[str]]:
    launcher = Instant(making)
    return Grid().run(SWEEP, making, launcher, Options(**options)), launcher.begun


def test_what_is_done_is_not_started_again(capsys):
    making = Making()
    assert swept(making) == (0, EVERY)
    assert making.checked == 4
    assert swept(making) == (0, [])
    assert [job.tasks for job in making.jobs.values()] == [1] * 4
    out, err = capsys.readouterr()
    assert out.split() == [each.replace(" ", "-") for each in EVERY]  # only of the second: a run prints its own
    assert err.count("done before") == 4
    assert err.count("4 of 4 runs done") == 2


@pytest.mark.parametrize("status", [1, 7, 137, -9])
def test_one_that_fails_stops_nothing_and_is_left_alone_until_that_is_asked(status: int, capsys):
    making = Making()
    making.statuses[EVERY[1]] = status
    assert swept(making) == (1, EVERY)
    why = f"OSError: {status}" if status > 0 else f"killed by signal {-status}"
    assert f"failed: x=1 seed=1: {why}\n" in capsys.readouterr().err
    said = status > 0  # what was killed without a word is simply not done
    assert swept(making) == (1, [] if said else [EVERY[1]])
    assert ("sweep.retry=true tries again" in capsys.readouterr().err) == said
    making.jobs[tuple(EVERY[1].split())].status = 0
    assert swept(making, retry=True) == (0, [EVERY[1]])


def test_nothing_further_is_started_after_a_failure_where_that_is_asked(capsys):
    making = Making()
    making.statuses[EVERY[1]] = 1
    assert swept(making, fail_fast=True) == (1, EVERY[:2])
    err = capsys.readouterr().err
    assert "1 of 4 runs done" in err
    assert [line for line in err.splitlines() if line.startswith("not made")] == [
        "not made: x=2 seed=0",
        "not made: x=2 seed=1",
    ]
    assert swept(making, fail_fast=True) == (1, EVERY[2:])  # a failure of before stops nothing


def test_nothing_is_started_when_the_hours_are_spent(capsys):
    making = Making()
    assert swept(making, hours=0.0) == (1, [])
    assert "the 0 hours are spent; the same command goes on" in capsys.readouterr().err
    assert swept(making, hours=1.0) == (0, EVERY)


def test_what_is_made_again_is_set_aside_once(monkeypatch):
    """Jobs that share a folder are one training and several evaluations: the second must not move the first away."""
    making = Making(rerun=True, shared=True)
    for one in EVERY:
        making.job(one.split()).finished = True
    emptied = lambda self: [setattr(job, "finished", False) for job in making.jobs.values()]  # noqa: E731
    asides: list[Any] = []
    monkeypatch.setattr(Made, "set_aside", lambda self: asides.append(emptied(self)))
    assert swept(making) == (0, EVERY)
    assert len(asides) == 1
