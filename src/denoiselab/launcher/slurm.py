"""Runs as jobs of SLURM, submitted as arrays through submitit."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from denoiselab.errors import UserError, one_line
from denoiselab.files import write_text
from denoiselab.launcher.base import Launcher, Task
from denoiselab.launcher.queue import SUFFIX, Seen, Submission, ask, read_submission
from denoiselab.launcher.slurm_task import Start
from denoiselab.progress import say

LOST = 10.0
"""Seconds for which SLURM does not name a job until it counts as gone; some sites answer squeue from a copy."""

DERIVED = frozenset(
    (
        *("nodes", "ntasks", "ntasks_per_node", "gpus", "gpus_per_node", "gpus_per_task"),
        *("partition", "account", "qos", "time", "cpus_per_task", "mem"),
        *("array", "comment", "job_name", "signal", "requeue", "no_requeue", "output", "error", "open_mode"),
    )
)
"""Options of sbatch that ``extra`` may not hold: they follow from the run's, or have a name of their own."""


@dataclass
class Waited:
    """A run that is waited for."""

    task: Task
    file: Path
    submission: Submission
    restarts: int = 0
    missed: float | None = None
    """Since when SLURM does not name it, on the clock of time.monotonic."""

    @property
    def job(self) -> str:
        return self.submission.job

    @property
    def folder(self) -> Path:
        return _folder(self.task)


class Slurm(Launcher):
    """Submits runs as job arrays, and waits for them; they outlive this process.

    One SLURM task per rank, so that Lightning's ranks are SLURM's tasks: nodes, tasks and GPUs of a job are those of
    its run. Runs of different shapes become several arrays. A run that reaches the time limit or is preempted saves and
    is requeued. Jobs that the command finds again, since it was issued before, are waited for and not submitted twice.

    Args:
        jobs: runs of an array at a time, >= 1; None for as many as there is room for.
        partition, account, qos: as sbatch takes them; None for the cluster's defaults.
        minutes: time limit of a job, > grace.
        requeues: how often a job that reached its limit is requeued, >= 0. submitit counts those stops that come in the
            last ten minutes of the limit, or its last fifth where that is longer; preemptions before are free.
        grace: seconds before the limit at which a run is told to save, > 0. SLURM may do it a minute sooner.
        cpus_per_task: cores of each rank, >= 1, and its threads.
        memory: GB on each node; None for the partition's default.
        setup: lines of the batch script before the run, such as ``module load cuda``.
        extra: further options of sbatch, such as ``{constraint: a100}``.
    """

    here: ClassVar[bool] = False
    outlived: ClassVar[bool] = True
    poll_seconds: ClassVar[float] = 0.5
    program: ClassVar[Sequence[str]] = (sys.executable, "-m", "denoiselab")

    def __init__(
        self,
        jobs: int | None = None,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        minutes: int = 240,
        requeues: int = 20,
        grace: int = 120,
        cpus_per_task: int = 4,
        memory: float | None = None,
        setup: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
    ):
        super().__init__(jobs)
        self.parallel, self.jobs = jobs, None  # all are submitted, and SLURM starts so many at a time
        for name, value, least in (("requeues", requeues, 0), ("grace", grace, 1), ("cpus_per_task", cpus_per_task, 1)):
            if value < least:
                raise UserError(f"launcher.{name}={value}: need at least {least}")
        if not 60 * minutes > grace:
            raise UserError(f"launcher.minutes={minutes}: need more than launcher.grace={grace} seconds")
        if memory is not None and not memory > 0:
            raise UserError(f"launcher.memory={memory}: need a number of GB > 0, or null for the partition's default")
        extra = {key.replace("-", "_"): value for key, value in (extra or {}).items()}
        for key in extra:
            if key in DERIVED:
                raise UserError(
                    f"launcher.extra.{key}={extra[key]}: follows from the run's trainer, or is an option of launcher"
                )
        _check_installed()
        self.requeues = requeues
        self.parameters = {
            "partition": partition,
            "account": account,
            "qos": qos,
            "time": minutes,
            "cpus_per_task": cpus_per_task,
            "mem": None if memory is None else f"{round(1024 * memory)}M",
            "signal_delay_s": grace,
            # A rank that died must not leave the others waiting for it in a collective.
            "setup": ["export SLURM_KILL_BAD_EXIT=1", *setup],
            # Since SLURM 22.05 srun does not take cpus from the job; and a requeued job goes on in its log.
            "srun_args": [f"--cpus-per-task={cpus_per_task}", "--open-mode=append"],
            "stderr_to_stdout": True,
            "wckey": None,
        }
        self.extra = extra
        self.seen: list[Seen] | None = None
        self.changed, self.next = time.monotonic(), 0.0

    def check(self, task: Task) -> None:
        if task.gpus is None or task.gpus < 0:
            raise UserError("trainer.devices: launcher=slurm needs a number of devices, as in trainer.devices=4")
        folder = _folder(task)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        here = folder.stat()
        if here.st_uid != os.getuid() or here.st_mode & 0o022:  # whoever writes there runs code on the nodes
            raise UserError(f"{folder}: others can write to this folder; need one that is yours alone (chmod 700)")

    def start(self, tasks: Sequence[Task]) -> list[Waited]:
        handles = {task: self._found(task) for task in tasks}
        new = [task for task in tasks if handles[task] is None]
        shapes = sorted({(task.nodes, task.ranks, task.gpus or 0) for task in new})
        for shape in shapes:
            same = [task for task in new if (task.nodes, task.ranks, task.gpus or 0) == shape]
            handles |= dict(zip(same, self._submit(same), strict=True))
        self.seen, self.next = None, 0.0  # what was seen before knows nothing of these
        return [handles[task] for task in tasks]  # type: ignore[misc]

    def _found(self, task: Task) -> Waited | None:
        """The job that was submitted for it before, if that is still there.

        Raises:
            UserError: what is there works on the same run, and was submitted with other options.
        """
        file = _file(task)
        for other in file.parent.glob(f"{task.folder.name}-*{SUFFIX}"):
            if other != file and (found := self._alive(read_submission(other))):
                raise UserError(
                    f"{task.folder}: SLURM job {found.job}, submitted before with other options, is "
                    f"{found.state.lower()}; wait for it, or scancel {found.job}"
                )
        submission = read_submission(file)
        seen = self._alive(submission)
        if submission is None or seen is None:
            return None
        submission.job = seen.job
        say(f"[{task.label}] SLURM job {seen.job}, submitted before, is {seen.state.lower()}; waiting for it")
        return Waited(task, file, submission, seen.restarts)

    def _alive(self, submission: Submission | None) -> Seen | None:
        seen = None if submission is None else submission.among(self._ask())
        return seen if seen and seen.alive else None

    def _ask(self) -> list[Seen]:
        seen = ask()
        if seen is None:
            raise UserError("launcher=slurm: squeue does not answer, so what was submitted before is not known")
        return seen

    def _submit(self, tasks: Sequence[Task]) -> list[Waited]:
        """As one array; a job of its own if it is one."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        token = f"denoiselab-{secrets.token_hex(8)}"
        waited = [
            Waited(task, _file(task), Submission(task.folder.name, token, index)) for index, task in enumerate(tasks)
        ]
        for one in waited:
            write_text(one.file, json.dumps(asdict(one.submission)) + "\n")
        try:
            with _undisturbed():
                jobs = self.executor(tasks, token).submit_array(
                    [Start([*self.program, *task.arguments]) for task in tasks]
                )
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"launcher=slurm: sbatch: {one_line(error).removeprefix('sbatch: ')}") from None
        for one, job in zip(waited, jobs, strict=True):
            one.submission.job = job.job_id
            write_text(one.file, json.dumps(asdict(one.submission)) + "\n")
        say(f"submitted as SLURM job {', '.join(_compact([one.job for one in waited]))}; logs in {waited[0].folder}")
        return waited

    def executor(self, tasks: Sequence[Task], token: str) -> Any:
        """submitit's, for tasks of one shape."""
        from submitit import SlurmExecutor

        executor = SlurmExecutor(_folder(tasks[0]), max_num_timeout=self.requeues)
        executor.update_parameters(
            **self.parameters,
            job_name=f"denoiselab-{tasks[0].folder.parent.name}",
            nodes=tasks[0].nodes,
            ntasks_per_node=tasks[0].ranks,
            gpus_per_node=tasks[0].gpus or None,
            array_parallelism=self.parallel or len(tasks),
            # requeue: some clusters have it off for jobs that do not say so
            additional_parameters={"requeue": True, "comment": token, **self.extra},
        )
        return executor

    def poll(self, handle: Waited) -> int | None:
        seen = self._latest()
        if seen is None:
            return None
        found = handle.submission.among(seen)
        name = f"[{handle.task.label}] SLURM job {handle.job}"
        log = handle.folder / f"{handle.job}_0_log.out"
        if found is None:  # it ended while nobody looked
            handle.missed = handle.missed or time.monotonic()
            if time.monotonic() - handle.missed < LOST:
                return None
            if (status := _kept(handle)) != 0:
                say(f"{name} is not known to SLURM any more and has left no result; its log: {log}")
        elif found.alive:
            handle.missed = None
            if found.restarts > handle.restarts:
                handle.restarts = found.restarts
                say(f"{name} was requeued")
            return None
        elif found.state == "COMPLETED":
            status = 0
        else:
            status = found.status if found.status <= 128 else 128 - found.status
            status = status or (-signal.SIGTERM if found.state == "CANCELLED" else 1)
            say(f"{name}: {found.state} ({found.reason}); its log: {log}")
        if status == 0:
            print(handle.task.folder, flush=True)
            handle.file.unlink(missing_ok=True)
        self._look_soon()
        return status

    def _latest(self) -> list[Seen] | None:
        """What SLURM said some seconds ago: one when things change, ten when they have not for long."""
        now = time.monotonic()
        if now >= self.next:
            before, self.seen = self.seen, ask()
            if self.seen != before:
                self.changed = now
            self.next = time.monotonic() + min(10, max(1, (now - self.changed) / 10))
        return self.seen

    def _look_soon(self) -> None:
        self.changed = time.monotonic()
        self.next = min(self.next, self.changed + 1)

    def withdraw(self) -> list[Task]:
        waiting = [handle for handle in self.running.values() if self._waits(handle)]
        if not waiting:
            return []
        subprocess.run(["scancel", "--state=PENDING", *(one.job for one in waiting)], capture_output=True, timeout=60)
        self.seen = ask() or self.seen
        withdrawn = [one for one in waiting if (found := one.submission.among(self.seen or [])) and not found.alive]
        for one in withdrawn:
            one.file.unlink(missing_ok=True)
        return [one.task for one in withdrawn]

    def _waits(self, handle: Waited) -> bool:
        """Whether it has never begun."""
        found = handle.submission.among(self.seen or [])
        return found is not None and found.waits and found.restarts == 0

    def stop(self, handles: Sequence[Waited], signum: int) -> None:
        jobs = _compact([one.job for one in handles])
        if jobs:
            say(f"SLURM job {', '.join(jobs)} goes on; the same command waits for it again, and this ends it:")
            say(f"scancel {' '.join(one.partition('_')[0] for one in jobs)}")


def _check_installed() -> None:
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("launcher=slurm: needs submitit; pip install denoiselab[slurm]") from None
    if missing := [name for name in ("sbatch", "squeue", "srun") if not shutil.which(name)]:
        raise UserError(f"launcher=slurm: no {missing[0]} here; give this command where jobs are submitted from")


def _file(task: Task) -> Path:
    """Of its submission, beside its composed configuration."""
    return Path(task.arguments[-1]).with_suffix(SUFFIX)


def _folder(task: Task) -> Path:
    """Of submitit's files, beside the runs."""
    return Path(task.arguments[-1]).parent / "slurm"


def _kept(handle: Waited) -> int:
    """0 if the job left word of its success, 1 otherwise."""
    from submitit.core.utils import JobPaths, pickle_load

    file = JobPaths(handle.folder, job_id=handle.job, task_id=0).result_pickle
    with suppress(OSError, EOFError):
        return 0 if pickle_load(file)[0] == "success" else 1
    return 1


def _compact(jobs: Sequence[str]) -> list[str]:
    """One id per array.

    >>> _compact(["12_0", "12_1", "12_3", "14"])
    ['12_[0,1,3]', '14']
    """
    found = []
    for array, members in itertools.groupby(jobs, lambda job: job.partition("_")[0]):
        indices = [index for job in members if (index := job.partition("_")[2])]
        found.append(f"{array}_[{','.join(indices)}]" if len(indices) > 1 else "_".join([array, *indices]))
    return found


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C does not reach sbatch, and what an own surrounding job says of itself is not taken for its options."""
    surrounding = {name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_"))} - {"SLURM_CONF"}
    kept = {name: os.environ.pop(name) for name in surrounding} if "SLURM_JOB_ID" in surrounding else {}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which sbatch inherits
    try:
        yield
    finally:
        os.environ.update(kept)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
