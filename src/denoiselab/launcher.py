"""The runs of a sweep as processes of this machine: several at a time, each with its share of the cores and GPUs.

A process each, so that a run that dies hard takes nothing with it, and none inherits another's memory, seeds or
loggers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from denoiselab.errors import Interrupted, UserError

POLL = 0.05
"""Seconds between looks at who has ended."""

DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


@dataclass
class Task:
    """One run to be made.

    Args:
        label: what it is called in front of its lines.
        arguments: of ``denoiselab``.
        folder: where it writes; never two processes in one.
        gpus: that it needs; 0 for none, None for its share of all.
    """

    label: str
    arguments: list[str]
    folder: Path
    gpus: int | None = 0


@dataclass
class _Running:
    number: int
    task: Task
    process: subprocess.Popen[str]
    gpus: list[str]
    pumps: list[threading.Thread] = field(default_factory=list)


class Local:
    """Starts ``denoiselab`` once per task, ``jobs`` at a time.

    Each process gets cores/jobs threads (OMP_NUM_THREADS, unless that is set), since more threads than cores make runs
    several times slower, and GPUs of its own. Signals are handed on, so that every run saves; should this process die
    without a word, its children are told to stop (on Linux). Lines of several runs at a time begin with the run's
    label.

    Args:
        jobs: runs at a time, >= 1.
    """

    program: ClassVar[Sequence[str]] = (sys.executable, "-m", "denoiselab")

    def __init__(self, jobs: int = 1):
        if jobs < 1:
            raise UserError(f"sweep.jobs={jobs}: need at least 1")
        self.jobs = jobs
        self.running: list[_Running] = []
        self.gpus = _gpus()
        self.share = len(self.gpus) // jobs or min(1, len(self.gpus))

    def run(self, tasks: Sequence[Task], started: Callable[[int], object], ended: Callable[[int, int], bool]) -> None:
        """Run all tasks.

        Args:
            tasks: started in their order, but those of one folder after each other.
            started: is told of each task, by its place in the list.
            ended: is told of each task's place and exit status (-n if signal n killed it), and returns whether to start
                more.

        Raises:
            Interrupted: a signal came; every process has ended by then.
            UserError: a task needs more GPUs than there are.
        """
        most = max((self._need(task) for task in tasks), default=0)
        if most > len(self.gpus):
            raise UserError(f"trainer.devices={most}: a run needs so many GPUs, and {len(self.gpus)} can be used here")
        waiting, more = [*range(len(tasks))], True
        with self._signals() as interrupted:
            while self.running or (waiting and more):
                while more and not interrupted and (k := self._next(tasks, waiting)) is not None:
                    waiting.remove(k)
                    started(k)
                    self.running.append(self._start(k, tasks[k]))
                    if interrupted:  # which came while it was started
                        self.running[-1].process.send_signal(interrupted[-1])
                time.sleep(POLL)
                for one in [one for one in self.running if one.process.poll() is not None]:
                    self.running.remove(one)
                    self.gpus += one.gpus
                    for pump in one.pumps:
                        pump.join()
                    more &= ended(one.number, one.process.returncode)
                more &= not interrupted
            if interrupted:
                raise Interrupted(interrupted[0])

    def _next(self, tasks: Sequence[Task], waiting: Sequence[int]) -> int | None:
        """The first task that can start now."""
        if len(self.running) >= self.jobs:
            return None
        held = [one.task.folder for one in self.running]

        def can_start(task: Task) -> bool:
            return task.folder not in held and self._need(task) <= len(self.gpus)

        return next((k for k in waiting if can_start(tasks[k])), None)

    def _need(self, task: Task) -> int:
        return self.share if task.gpus is None else task.gpus

    def _start(self, number: int, task: Task) -> _Running:
        need = self._need(task)
        mine, self.gpus = self.gpus[:need], self.gpus[need:]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        live = self.jobs == 1 and sys.stderr.isatty()  # whose progress bar wants a terminal
        process = subprocess.Popen(
            [*self.program, *task.arguments],
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if live else subprocess.PIPE,
            start_new_session=True,  # signals of the terminal come once, from here
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        prefix = f"[{task.label}] " if self.jobs > 1 else ""
        streams = [(process.stdout, sys.stdout, ""), (process.stderr, sys.stderr, prefix)]
        pumps = [threading.Thread(target=_pump, args=stream, daemon=True) for stream in streams if stream[0]]
        for pump in pumps:
            pump.start()
        return _Running(number, task, process, mine, pumps)

    @contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """Hand signals on to the processes; the list holds those that came."""
        came: list[int] = []

        def hand_on(signum: int, frame: object) -> None:
            came.append(signum)
            for one in self.running:
                if one.process.poll() is None:
                    one.process.send_signal(signum)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield came
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _pump(source: IO[str], sink: IO[str], prefix: str) -> None:
    with source:
        for line in source:
            sink.write(prefix + line)
            sink.flush()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named or [str(number) for number in range(torch.cuda.device_count())]
