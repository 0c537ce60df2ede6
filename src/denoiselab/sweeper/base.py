"""What sweepers share: what is done already is not made again, what failed does not stop the rest, and the end says
how it went."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from denoiselab.compose import option, sweeps
from denoiselab.errors import UserError
from denoiselab.launcher import Launcher, Task
from denoiselab.progress import say


class Job(Protocol):
    """One job of a sweep, composed and checked."""

    @property
    def path(self) -> Path:
        """The folder of its result."""
        ...

    @property
    def evaluation_address(self) -> str:
        """What its evaluation's result depends on beside the run."""
        ...

    @property
    def makes(self) -> Hashable:
        """What it makes; two jobs that make the same are one."""
        ...

    @property
    def overrides(self) -> list[str]:
        """That it was made of."""
        ...

    @property
    def command(self) -> str:
        """That makes it alone, for a shell."""
        ...

    @property
    def rerun(self) -> bool:
        """Whether what is there is to be made again."""
        ...

    @property
    def finished(self) -> bool: ...

    @property
    def error(self) -> str:
        """Why it failed when it was last tried; empty if it did not."""
        ...

    def set_aside(self) -> None:
        """Make room for its result being made again."""
        ...

    def task(self, label: str) -> Task:
        """What is started; whatever that needs is written."""
        ...


class Maker(Protocol):
    """Makes jobs of overrides."""

    what: str
    """What it makes, in the plural."""
    was: str
    """What one that is finished already is."""

    def compose(self, overrides: list[str]) -> object:
        """Look at the options and their types alone; raises UserError."""
        ...

    def job(self, overrides: list[str]) -> Job:
        """Raises UserError for one that cannot work."""
        ...

    def check(self, jobs: list[Job], overrides: Sequence[str]) -> None:
        """Look at jobs that are known together, before the first starts; raises UserError."""
        ...


@dataclass
class Options:
    """Of a sweep, whatever chooses its jobs.

    Args:
        fail_fast: start nothing further once one has failed.
        retry: also those that failed when the command was issued before.
        hours: after which nothing further is started; None for no end.
    """

    fail_fast: bool = False
    retry: bool = False
    hours: float | None = None


class Sweeper:
    """Chooses jobs, hands those that are not done to a launcher, and remembers how they ended."""

    options: Options
    maker: Maker

    def begin(self, overrides: Sequence[str]) -> None:
        """Compose and check all that can be known before the first job starts.

        Args:
            overrides: as on the command line, values to be swept among them.
        """
        raise NotImplementedError

    def take(self, held: int) -> list[Task]:
        """Tasks that may start now, while ``held`` others are waiting or running."""
        raise NotImplementedError

    def finish(self) -> None:
        """Say what the sweep found."""

    def run(self, overrides: Sequence[str], maker: Maker, launcher: Launcher, options: Options) -> int:
        """Make all jobs; 0 if all are done in the end, 1 if one failed or was not made."""
        self.maker, self.options = maker, options
        self.swept = {option(line) for line in overrides if sweeps(line)}
        self.jobs: dict[Task, Job] = {}
        self.done: list[Job] = []
        self.failures: list[tuple[Job, str]] = []
        self.left: list[Job] = []
        self.aside: set[Path] = set()
        self.end = float("inf") if options.hours is None else time.monotonic() + 3600 * options.hours
        self.begin(overrides)
        launcher.run(self)
        self.finish()
        total = len(self.done) + len(self.failures) + len(self.left)
        say(f"{len(self.done)} of {total} {self.maker.what} done")
        if self.left and time.monotonic() > self.end:
            say(f"the {options.hours:g} hours are spent; the same command goes on")
        for job in self.left:
            say(f"not made: {self.asked(job)}")
        for job, why in self.failures:
            say(f"failed: {self.asked(job)}: {why}")
        return 1 if self.failures or self.left else 0

    def admit(self, job: Job, label: str) -> Task | None:
        """The task of a job that is to be made; None for one that is done, or failed before and is left alone."""
        if job.rerun and job.path not in self.aside:  # what this sweep makes is not moved aside by it
            self.aside.add(job.path)
            job.set_aside()
        if job.finished:
            say(f"[{label}] {self.maker.was}")
            print(job.path, flush=True)
            self.done.append(job)
            return None
        if job.error and not self.options.retry:
            self.failures.append((job, f"{job.error} (it failed before; sweep.retry=true tries again)"))
            return None
        task = job.task(label)
        self.jobs[task] = job
        self.left.append(job)
        return task

    def asked(self, job: Job) -> str:
        """What tells a job from the others, in words."""
        return " ".join(line for line in job.overrides if option(line) in self.swept) or job.path.name

    @property
    def stopped(self) -> bool:
        failed = any(job in self.jobs.values() for job, _ in self.failures)
        return (failed and self.options.fail_fast) or time.monotonic() > self.end

    def started(self, task: Task) -> None:
        say(f"[{task.label}] {self.asked(self.jobs[task])}")

    def ended(self, task: Task, status: int) -> None:
        job = self.jobs[task]
        self.left.remove(job)
        if status:
            died = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self.failures.append((job, job.error or died))
        else:
            self.done.append(job)


def refuse_idle_axes(jobs: Sequence[Job], overrides: Sequence[str]) -> None:
    """A sweep two of whose jobs make the same has an axis without effect."""
    seen: dict[Hashable, Job] = {}
    for job in jobs:
        twin = seen.setdefault(job.makes, job)
        if twin is not job:
            pairs = zip(twin.overrides, job.overrides, strict=True)
            axis = next((f"{a} and {b}" for a, b in pairs if a != b), " ".join(overrides))
            raise UserError(f"{axis}: this axis has no effect; both make {job.path}")
