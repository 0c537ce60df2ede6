"""Runs as processes of this machine: several at a time, each with its share of the cores and GPUs.

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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from denoiselab.errors import UserError
from denoiselab.launcher.base import Launcher, Task

DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""

GRACE = 30.0
"""Seconds that a run which was told to stop has for saving."""


@dataclass
class Running:
    """A process, and what it holds."""

    process: subprocess.Popen[str]
    gpus: list[str]
    pumps: list[threading.Thread]
    end: float
    """When it is told to stop, then when it is killed, on the clock of time.monotonic."""
    told: bool = False


class Local(Launcher):
    """Starts ``denoiselab`` once per task, ``jobs`` at a time.

    Each process gets cores/jobs threads (OMP_NUM_THREADS, unless that is set), since more threads than cores make runs
    several times slower, and GPUs of its own. Signals are handed on, so that every run saves; should this process die
    without a word, its children are told to stop (on Linux). Lines of several runs at a time begin with the run's
    label.

    Args:
        jobs: runs at a time, >= 1.
        minutes: after which a run is told to save and stop, and 30 s later killed; None for never.
    """

    program: ClassVar[Sequence[str]] = (sys.executable, "-m", "denoiselab")

    def __init__(self, jobs: int = 1, minutes: float | None = None):
        super().__init__(jobs)
        if minutes is not None and not minutes > 0:
            raise UserError(f"launcher.minutes={minutes}: need a number > 0, or null for no limit")
        self.at_once, self.minutes = jobs, minutes
        self.gpus = _gpus()
        self.share = len(self.gpus) // jobs or min(1, len(self.gpus))

    def check(self, task: Task) -> None:
        if task.nodes > 1:
            raise UserError(f"trainer.nodes={task.nodes}: this is one machine; launcher=slurm runs on several")
        if self._need(task) > len(self.gpus):
            raise UserError(
                f"trainer.devices={self._need(task)}: a run needs so many GPUs, and {len(self.gpus)} can be used here"
            )

    def fits(self, task: Task, beside: Sequence[Task]) -> bool:
        return sum(map(self._need, [*beside, task])) <= len(self.gpus)

    def _need(self, task: Task) -> int:
        return self.share if task.gpus is None else task.gpus

    def start(self, tasks: Sequence[Task]) -> list[Running]:
        return [self._start_one(task) for task in tasks]

    def _start_one(self, task: Task) -> Running:
        need = self._need(task)
        mine, self.gpus = self.gpus[:need], self.gpus[need:]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})}
        cores = (os.cpu_count() or 1) // (self.at_once * task.ranks)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        live = self.jobs == 1 and sys.stderr.isatty()  # whose progress bar wants a terminal
        process = subprocess.Popen(
            [*self.program, *task.arguments],
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if live else subprocess.PIPE,
            start_new_session=True,  # signals of the terminal come once, from here
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        prefix = f"[{task.label}] " if self.at_once > 1 else ""
        log = task.log
        streams = [(process.stdout, sys.stdout, "", None), (process.stderr, sys.stderr, prefix, log)]
        pumps = [threading.Thread(target=_pump, args=stream, daemon=True) for stream in streams if stream[0]]
        for pump in pumps:
            pump.start()
        end = float("inf") if self.minutes is None else time.monotonic() + 60 * self.minutes
        return Running(process, mine, pumps, end)

    def poll(self, handle: Running) -> int | None:
        status = handle.process.poll()
        if status is None:
            if time.monotonic() > handle.end:
                handle.process.send_signal(signal.SIGKILL if handle.told else signal.SIGTERM)
                handle.told, handle.end = True, handle.end + GRACE
            return None
        if status:
            kill_group(handle.process.pid)
        self.gpus += handle.gpus
        for pump in handle.pumps:
            pump.join()
        return status

    def stop(self, handles: Sequence[Running], signum: int) -> None:
        for one in handles:
            if one.process.poll() is None:
                one.process.send_signal(signum)


def _pump(source: IO[str], sink: IO[str], prefix: str, log: Path | None) -> None:
    """Hand lines on, and keep them; a disk that is full must not make the run wait for somebody who reads them."""
    with source:
        for line in source:
            sink.write(prefix + line)
            sink.flush()
            if log is not None:
                with suppress(OSError), log.open("a") as file:
                    file.write(line)


def kill_group(leader: int) -> None:
    """What is left of a run whose first process died: its other ranks, its loaders."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Get a signal when the process that started this one ends (on Linux)."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signum)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named or [str(number) for number in range(torch.cuda.device_count())]
