"""denoiselab train"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoiselab.cli import parse
from denoiselab.compose import Composed, compose, option, plain, read_job
from denoiselab.errors import UserError

if TYPE_CHECKING:
    from denoiselab.training import Job

ABOUT = """Train a model, evaluate it, and keep everything in a run directory whose name follows from the options that
determine the result. Issuing the command again continues an interrupted run and skips a finished one. With -m, each run
is a process of its own, where and how many at a time is the launcher's; one that fails does not stop the others."""

ONE_OF_SEVERAL = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--job"]:  # how a launcher starts a run, and a run its ranks
        if len(arguments) != 2:
            raise UserError(f"{' '.join(arguments)}: need one file, as a launcher writes it")
        from denoiselab.training import Job

        file = Path(arguments[1])
        Job(read_job(file), file).run()
        return 0
    overrides, config_dir, multirun = parse(arguments, "train", ABOUT)
    if multirun:
        return run_all(overrides, config_dir)
    composed = compose("train", overrides, config_dir)
    from denoiselab import lint
    from denoiselab.training import Job  # after composing: a mistyped option need not wait for torch

    job = Job(composed)
    if job.rank_zero:
        lint.say(job.advice)
    job.run()
    return 0


def run_all(overrides: list[str], config_dir: Path | None) -> int:
    """Make every run of a sweep that is not done yet; 0 if all are done in the end, 1 if one failed."""
    if any(int(os.environ.get(name, "1")) > 1 for name in ONE_OF_SEVERAL):
        raise UserError("-m: was started as one of several ranks; start the sweep once, and its runs start their ranks")
    about_all = [line for line in overrides if option(line).partition(".")[0] in ("study", "sweep", *CHOSEN)]
    config = plain(compose("train", about_all, config_dir))
    from denoiselab.experiment import Parts
    from denoiselab.sweeper.base import Options

    sweeper, launcher = (Parts(config).make(group) for group in CHOSEN)
    hours = (config["study"] or {}).get("budget")
    if hours is not None and not (isinstance(hours, int | float) and hours > 0):
        raise UserError(f"study.budget={hours}: need hours > 0, or null for no end")
    maker = Training(config_dir, launcher.here)
    return sweeper.run(overrides, maker, launcher, Options(**config["sweep"], hours=hours))


CHOSEN = ("sweeper", "launcher")
"""Groups that all runs of a sweep share."""


class Training:
    """Makes runs of overrides.

    Args:
        config_dir: the user's own folder of options.
        here: whether they are made on this machine.
    """

    what, was = "runs", "done and evaluated before"

    def __init__(self, config_dir: Path | None, here: bool):
        self.config_dir, self.here = config_dir, here

    def compose(self, overrides: list[str]) -> Composed:
        return compose("train", overrides, self.config_dir)

    def job(self, overrides: list[str]) -> Job:
        composed = self.compose(overrides)
        from denoiselab.training import Job  # after composing: a mistyped option need not wait for torch

        return Job(composed, here=self.here)

    def check(self, jobs: Sequence[Any], overrides: Sequence[str]) -> None:
        from denoiselab import lint
        from denoiselab.sweeper.base import refuse_idle_axes

        refuse_idle_axes(jobs, overrides)
        lint.say([*lint.sweep([job.config for job in jobs]), *(one for job in jobs for one in job.advice)])
