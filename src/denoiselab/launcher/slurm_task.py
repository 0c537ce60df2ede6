"""What runs in the tasks of a SLURM job.

Who asks for a requeue: submitit, on SIGUSR2, which SLURM sends before the time limit; nobody else (Lightning's own
requeue is off). What a requeued job goes on from is in its run's folder, not in submitit's files.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from denoiselab.launcher.local import DEATH_SIGNAL
from denoiselab.launcher.queue import ask, mine

STOPPED = frozenset(
    n for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) for n in (128 + int(s), -int(s))
)
"""Statuses of a run that was told to stop."""


class Start:
    """What submitit calls in each of a job's tasks: a rank of the run, as a process of its own.

    A process of its own, so that its exit status is the task's, that it has its signals to itself, and that this one
    stays small. It is told to stop by SIGTERM, whatever this one was told by. SLURM may send a signal to it as well; it
    then finds SIGUSR2 ignored, except during training, which takes it as it takes SIGTERM.

    Args:
        command: that is run, a rank in each task.
    """

    def __init__(self, command: Sequence[str]):
        self.command = [*command]
        self.pid: int | None = None

    def __call__(self) -> None:
        _forget_torn_files()
        signal.signal(signal.SIGTERM, self._hand_on)
        threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        # No Popen.wait or poll: both hold a lock that a handler which waits as well would wait for for ever.
        process = subprocess.Popen(
            self.command,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            stdin=subprocess.DEVNULL,
            preexec_fn=_prepare,
        )
        self.pid = process.pid
        process.returncode = status = self._wait()
        if status in STOPPED:
            if os.environ.get("SLURM_PROCID", "0") != "0":
                return  # rank 0 asks for the requeue, and must not be killed for this rank's status meanwhile
            if _goes_on():  # neither cancelled nor requeued by somebody else: it is being preempted, or at its limit
                os.kill(os.getpid(), signal.SIGUSR2)
        if status:
            sys.exit(status if status > 0 else 128 - status)  # which is the task's, where an exception's would be 1

    def checkpoint(self) -> Any:
        """What submitit runs after the requeue: the same, once this one has saved; nothing if it failed meanwhile."""
        from submitit.core.utils import DelayedSubmission

        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a second one would ask for a second requeue
        if self.pid is not None:
            self._hand_on()
            if (status := self._wait()) and status not in STOPPED:
                return None
        _forget_torn_files()
        return DelayedSubmission(Start(self.command))

    def _hand_on(self, *args: object) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def _wait(self) -> int:
        """The run's exit status, or -n; may be asked again, also from a handler that interrupts it."""
        assert self.pid is not None
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _prepare() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


def _goes_on() -> bool:
    """Whether SLURM counts this job as running."""
    job = (mine() or {}).get("job")
    return any(one.job == job and one.state == "RUNNING" for one in ask() or [])


def _forget_torn_files() -> None:
    """submitit writes FILE.save_tmp and renames it, and refuses to write where one lies that a killed task left."""
    from submitit.core.job_environment import JobEnvironment

    paths = JobEnvironment().paths
    shared = [paths.submitted_pickle] if paths.task_id == 0 else []  # which rank 0 writes
    for file in (*shared, paths.result_pickle):
        file.with_suffix(file.suffix + ".save_tmp").unlink(missing_ok=True)
