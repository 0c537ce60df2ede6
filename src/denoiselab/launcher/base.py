"""What launchers share: which task may start, who has ended, and what a signal does."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from denoiselab.errors import Interrupted, UserError

LOG = ".log"
"""Of the file with what a task says."""


@dataclass(eq=False)
class Task:
    """One run to be made, in processes of its own.

    Args:
        label: what it is called in front of its lines.
        arguments: of ``denoiselab``.
        folder: where it writes; never two tasks in one at a time.
        ranks: processes on each node that work on it together.
        nodes: machines that work on it together.
        gpus: that it needs on each node; 0 for none, None for its share of all.
    """

    label: str
    arguments: list[str]
    folder: Path
    ranks: int = 1
    nodes: int = 1
    gpus: int | None = 0

    @property
    def log(self) -> Path | None:
        """What it says, where it is started from a job file: kept beside that."""
        return Path(self.arguments[-1]).with_suffix(LOG) if "--job" in self.arguments else None


class Source(Protocol):
    """Where a launcher's tasks come from, and who is told of them."""

    @property
    def stopped(self) -> bool:
        """Whether no further task may start."""
        ...

    def take(self, held: int) -> list[Task]:
        """Tasks that may start now, while ``held`` others are waiting or running; none, and none held: all is done."""
        ...

    def started(self, task: Task) -> None: ...

    def ended(self, task: Task, status: int) -> None:
        """With its exit status, or -n if signal n killed it."""
        ...


class Launcher:
    """Starts ``denoiselab`` once per task; a subclass says how tasks are started, and how they are.

    Args:
        jobs: tasks at a time, >= 1; None for all that there are.
    """

    here: ClassVar[bool] = True
    """Whether runs are made on this machine, whose devices are then theirs."""

    outlived: ClassVar[bool] = False
    """Whether runs go on when this process ends."""

    poll_seconds: ClassVar[float] = 0.05
    """Between looks at who has ended."""

    def __init__(self, jobs: int | None = None):
        if jobs is not None and jobs < 1:
            raise UserError(f"launcher.jobs={jobs}: need at least 1")
        self.jobs = jobs
        self.running: dict[Task, Any] = {}
        """With the handle of each."""

    def start(self, tasks: Sequence[Task]) -> list[Any]:
        """Start these; a handle of each."""
        raise NotImplementedError

    def poll(self, handle: Any) -> int | None:
        """The exit status of one that has ended (-n if signal n killed it), None while it goes on; not asked again
        once it has answered."""
        raise NotImplementedError

    def stop(self, handles: Sequence[Any], signum: int) -> None:
        """This process was told to stop: hand the signal on to these, or say what becomes of them."""
        raise NotImplementedError

    def withdraw(self) -> list[Task]:
        """Take back those of the running that have not begun, since nothing further is to."""
        return []

    def check(self, task: Task) -> None:
        """Refuse a task that could never start here."""

    def fits(self, task: Task, beside: Sequence[Task]) -> bool:
        """Whether there is room for it now, beside those running and those about to be started."""
        return True

    def run(self, source: Source) -> None:
        """Run all tasks of a source, in their order where there is room for them.

        Raises:
            Interrupted: a signal came.
            UserError: a task that can never start here.
        """
        waiting: list[Task] = []
        with self._signals() as came:
            while True:
                if came or source.stopped:
                    waiting = []
                    for task in [] if came else self.withdraw():
                        del self.running[task]
                else:
                    new = source.take(len(waiting) + len(self.running))
                    for task in new:
                        self.check(task)
                    waiting += new
                    ready = [] if came else self._ready(waiting)  # a signal may come while the source looks for more
                    self._start(ready, source, came)
                    waiting = [task for task in waiting if task not in ready]
                if (not self.running and not waiting) or (came and self.outlived):
                    break
                time.sleep(self.poll_seconds)
                for task, handle in [*self.running.items()]:
                    status = self.poll(handle)
                    if status is not None:
                        del self.running[task]
                        source.ended(task, status)
            if came:
                raise Interrupted(came[0])

    def _ready(self, waiting: Sequence[Task]) -> list[Task]:
        """Those that there is room for."""
        ready: list[Task] = []
        folders = {task.folder for task in self.running}
        for task in waiting:
            if self.jobs is not None and len(self.running) + len(ready) >= self.jobs:
                break
            if task.folder not in folders and self.fits(task, ready):
                ready.append(task)
                folders.add(task.folder)
        return ready

    def _start(self, tasks: Sequence[Task], source: Source, came: list[int]) -> None:
        if not tasks:
            return
        for task in tasks:
            source.started(task)
        handles = self.start(tasks)
        self.running |= dict(zip(tasks, handles, strict=True))
        if came:  # while they were started
            self.stop(handles, came[-1])

    @contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """Those that came."""
        came: list[int] = []

        def note(signum: int, frame: object) -> None:
            came.append(signum)
            self.stop([*self.running.values()], signum)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield came
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
