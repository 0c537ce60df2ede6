"""denoiselab train"""

from __future__ import annotations

import sys
from pathlib import Path

from denoiselab.cli import parse
from denoiselab.compose import Composed, compose, sweep
from denoiselab.errors import Interrupted, UserError

ABOUT = """Train a model, evaluate it, and keep everything in a run directory whose name follows from the options that
determine the result. Issuing the command again continues an interrupted run and skips a finished one."""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "train", ABOUT)
    jobs = [compose("train", job, config_dir) for job in (sweep(overrides) if multirun else [overrides])]
    from denoiselab.training import Job  # after composing: a mistyped option need not wait for torch

    planned = [Job(job) for job in jobs]
    refuse_idle_axes(planned, overrides)
    for number, job in enumerate(planned):  # a run that this command makes is not moved aside by its next job
        job.config["rerun"] &= job.folder.path not in [earlier.folder.path for earlier in planned[:number]]
    failures = [failure for number, job in enumerate(planned) if (failure := attempt(job, number, len(planned)))]
    if len(planned) > 1:
        print(f"{len(planned) - len(failures)} of {len(planned)} runs done", file=sys.stderr)
        for job, error in failures:
            print(f"failed: {' '.join(job.composed.overrides)}: {error}", file=sys.stderr)
    return 0 if not failures else getattr(failures[0][1], "status", 1) if len(planned) == 1 else 1


def attempt(job, number: int, total: int):
    """Run one job; a failed one does not stop the others. Returns None, or the job and its error."""
    if total > 1:
        print(f"[{number + 1}/{total}] {' '.join(job.composed.overrides)}", file=sys.stderr)
    try:
        job.run()
    except Interrupted:
        raise
    except Exception as error:
        if not hasattr(error, "status"):
            import traceback

            traceback.print_exc()
        elif total == 1:
            raise
        return job, error
    return None


def refuse_idle_axes(jobs: list, overrides: list[str]) -> None:
    """A sweep two of whose jobs are the same run with the same evaluation has an axis without effect."""
    seen: dict[tuple[Path, str], Composed] = {}
    for job in jobs:
        twin = seen.setdefault((job.folder.path, job.evaluation_address), job.composed)
        if twin is not job.composed:
            pairs = zip(twin.overrides, job.composed.overrides, strict=True)
            axis = next((f"{a} and {b}" for a, b in pairs if a != b), " ".join(overrides))
            raise UserError(f"{axis}: this axis has no effect; both give run {job.folder.path.name} and one evaluation")
