"""denoiselab train"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from denoiselab.cli import parse
from denoiselab.compose import Composed, compose, sweep
from denoiselab.errors import UserError

if TYPE_CHECKING:
    from denoiselab.launcher import Task
    from denoiselab.training import Job

ABOUT = """Train a model, evaluate it, and keep everything in a run directory whose name follows from the options that
determine the result. Issuing the command again continues an interrupted run and skips a finished one. With -m, each run
is a process of its own, sweep.jobs at a time; one that fails does not stop the others."""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "train", ABOUT)
    if multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m: was started as one of several ranks; start the sweep once, and its runs start their ranks")
    jobs = [compose("train", job, config_dir) for job in (sweep(overrides) if multirun else [overrides])]
    from denoiselab import lint
    from denoiselab.training import Job  # after composing: a mistyped option need not wait for torch

    planned = [Job(job) for job in jobs]
    refuse_idle_axes(planned, overrides)
    if planned[0].rank_zero:
        lint.say([*lint.sweep([job.config for job in planned]), *(one for job in planned for one in job.advice)])
    if not multirun:
        planned[0].run()
        return 0
    return run_all(planned)


def run_all(planned: list[Job]) -> int:
    """Run what is not done yet; 0 if all is done in the end, 1 if a run failed."""
    from denoiselab.launcher import Local

    options, failures = planned[0].config["sweep"], {}
    tasks, waiting, made, moved = [], [], set(), set()
    for number, job in enumerate(planned):
        again = job.config["rerun"] and job.folder.path not in moved  # what this sweep makes is not moved aside by it
        if job.finished and not again:
            print(f"[{number + 1}/{len(planned)}] done and evaluated before", file=sys.stderr, flush=True)
            print(job.folder.path, flush=True)
        elif job.folder.read_status().get("state") == "failed" and not again and not options["retry"]:
            failures[number] = f"{_error(job)} (it failed before; sweep.retry=true tries again)"
        else:
            tasks.append(_task(f"{number + 1}/{len(planned)}", job, rerun=again))
            waiting.append(number)
        moved |= {job.folder.path} if again else set()
    if tasks:
        print(f"{len(tasks)} of {len(planned)} runs to make, {options['jobs']} at a time", file=sys.stderr, flush=True)

    def started(k: int) -> None:
        print(f"[{tasks[k].label}] {_asked(planned[waiting[k]])}", file=sys.stderr, flush=True)

    def ended(k: int, status: int) -> bool:
        number = waiting[k]
        made.add(number)
        if status:
            died = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            failures[number] = _error(planned[number]) or died
        return not (status and options["fail_fast"])

    Local(options["jobs"]).run(tasks, started, ended)
    left = [number for number in waiting if number not in made]
    print(f"{len(planned) - len(failures) - len(left)} of {len(planned)} runs done", file=sys.stderr)
    for number in left:
        print(f"not made: {_asked(planned[number])}", file=sys.stderr)
    for number, why in sorted(failures.items()):
        print(f"failed: {_asked(planned[number])}: {why}", file=sys.stderr)
    return 1 if failures or left else 0


def _asked(job: Job) -> str:
    return " ".join(job.composed.overrides)


def _task(label: str, job: Job, rerun: bool) -> Task:
    from denoiselab.launcher import Task

    own = [line for line in job.own_arguments() if not line.startswith(("rerun=", "lint.level="))]
    own += ["rerun=true"] if rerun else []
    return Task(label, ["train", *own, "lint.level=none"], job.folder.path, job.gpus)  # said once, for the whole sweep


def _error(job: Job) -> str:
    """What the run's folder says of its failure."""
    status = job.folder.read_status()
    return str(status.get("error") or "") if status.get("state") == "failed" else ""


def refuse_idle_axes(jobs: list, overrides: list[str]) -> None:
    """A sweep two of whose jobs are the same run with the same evaluation has an axis without effect."""
    seen: dict[tuple[Path, str], Composed] = {}
    for job in jobs:
        twin = seen.setdefault((job.folder.path, job.evaluation_address), job.composed)
        if twin is not job.composed:
            pairs = zip(twin.overrides, job.composed.overrides, strict=True)
            axis = next((f"{a} and {b}" for a, b in pairs if a != b), " ".join(overrides))
            raise UserError(f"{axis}: this axis has no effect; both give run {job.folder.path.name} and one evaluation")
