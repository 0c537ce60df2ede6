"""denoiselab evaluate"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoiselab.cli import parse
from denoiselab.cli.train import ONE_OF_SEVERAL
from denoiselab.compose import Composed, compose, option, plain, read_job, sweep, value_of
from denoiselab.errors import UserError

if TYPE_CHECKING:
    from denoiselab.measuring import Job
    from denoiselab.run import Run

ABOUT = """Measure a run or a checkpoint. Each evaluation (sampler, guidance, n, seed, weights, metrics) has an address
of its own under the run and is made once. With -m, each is a process of its own, where and how many at a time is the
launcher's; one that fails does not stop the others; and ckpt may be a folder of runs, which means all that are done."""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--job"]:  # how a launcher starts an evaluation
        from denoiselab.measuring import Asked, loaded

        composed = read_job(Path(arguments[1]))
        print(Asked(composed, loaded(plain(composed))).make(), flush=True)
        return 0
    overrides, config_dir, multirun = parse(arguments, "evaluate", ABOUT)
    if multirun:
        return run_all(overrides, config_dir)
    config = beside_metrics(compose("evaluate", without_metrics(overrides), config_dir))
    from denoiselab import lint
    from denoiselab.measuring import Asked, loaded  # after composing: a mistyped option need not wait for torch

    if runs := runs_in(Path(str(config["ckpt"]))):
        raise UserError(f"ckpt={config['ckpt']}: holds {len(runs)} runs; name one, or measure all of them with -m")
    run = loaded(config)
    composed = compose("evaluate", [*own_metrics(overrides, run), *overrides], config_dir)
    composed.overrides = overrides
    asked = Asked(composed, run)
    lint.say(asked.advice)
    print(asked.make(), flush=True)
    return 0


def run_all(overrides: list[str], config_dir: Path | None) -> int:
    """Make every evaluation of a sweep that is not there yet; 0 if all are there in the end, 1 if one failed."""
    if any(int(os.environ.get(name, "1")) > 1 for name in ONE_OF_SEVERAL):
        raise UserError("-m: was started as one of several ranks; start the sweep once")
    about_all = [line for line in overrides if option(line).partition(".")[0] in ("sweep", "launcher")]
    config = plain(compose("evaluate", ["ckpt=none", *about_all], config_dir))
    overrides = spread_out(overrides)
    from denoiselab.experiment import Parts
    from denoiselab.sweeper import Grid
    from denoiselab.sweeper.base import Options

    launcher = Parts(config).make("launcher")
    return Grid().run(overrides, Evaluations(config_dir, launcher.here), launcher, Options(**config["sweep"]))


class Evaluations:
    """Makes evaluations of overrides.

    Args:
        config_dir: the user's own folder of options.
        here: whether they are made on this machine.
    """

    what, was = "evaluations", "measured before"

    def __init__(self, config_dir: Path | None, here: bool):
        self.config_dir, self.here = config_dir, here
        self.composed = cache(lambda lines: compose("evaluate", ["ckpt=none", *lines], config_dir))
        self.newest: tuple[Any, Run] | None = None

    def compose(self, overrides: list[str]) -> Composed:
        return compose("evaluate", overrides, self.config_dir)

    def job(self, overrides: list[str]) -> Job:
        others = tuple(line for line in overrides if option(line) != "ckpt")
        named = [value_of(line) for line in overrides if option(line) == "ckpt"]
        config = beside_metrics(self.composed(without_metrics(others)))
        if not named:
            plain(compose("evaluate", [], self.config_dir))  # says that there is none
        from denoiselab.checks import check_evaluation
        from denoiselab.measuring import Asked, Job
        from denoiselab.run import devices_of

        check_evaluation(config)
        if self.here:
            devices_of(config["device"])
        run = self._outline(str(named[-1]), config["evaluation"]["weights"])
        found = self.composed((*own_metrics(others, run), *others))
        composed = Composed(copy.deepcopy(found.config), found.choices, overrides, self.config_dir)
        composed.config.ckpt = str(named[-1])
        return Job(Asked(composed, run), overrides, self.here)

    def _outline(self, ckpt: str, weights: str) -> Run:
        """The last one is kept: evaluations come run by run."""
        from denoiselab.outline import outline

        if self.newest is None or self.newest[0] != (ckpt, weights):
            self.newest = (ckpt, weights), outline(ckpt, weights, self.newest and self.newest[1])
        return self.newest[1]

    def check(self, jobs: Sequence[Any], overrides: Sequence[str]) -> None:
        from denoiselab import lint
        from denoiselab.sweeper.base import refuse_idle_axes

        refuse_idle_axes(jobs, overrides)
        lint.say(one for job in jobs for one in job.advice)


def spread_out(overrides: Sequence[str]) -> list[str]:
    """Overrides with each folder of runs as the runs in it that are done, and ckpt first, so that evaluations come run
    by run."""
    lines = [line for line in overrides if option(line) == "ckpt"]
    if len(lines) != 1:
        return [*overrides]
    texts: list[str] = []
    for (line,) in sweep(lines):
        runs = runs_in(Path(str(value_of(line))))
        texts += [_quoted(str(run)) for run in _done(runs)] if runs else [line.partition("=")[2]]
        if runs and not texts:
            raise UserError(f"{line}: none of its {len(runs)} runs is done; name one to measure it as it stands")
    return [f"ckpt={','.join(texts)}", *(line for line in overrides if line not in lines)]


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder that is neither a run nor an export."""
    from denoiselab.report.runs import find

    alone = any((folder / name).exists() for name in ("checkpoints", "identity.json", "config.json"))
    return [] if alone or not folder.is_dir() else find(folder)


def _done(runs: Sequence[Path]) -> list[Path]:
    """Those that are done; the others are said."""
    from denoiselab.status import standing

    done = []
    for run in runs:
        state = standing(run, run).state
        if state == "done":
            done.append(run)
        else:
            print(f"passing over {run}: {state}; ckpt={run} measures it as it stands", file=sys.stderr, flush=True)
    return done


def _quoted(text: str) -> str:
    """A path in the grammar of overrides."""
    if re.fullmatch(r"[\w.-]*/[\w./-]*", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), text) + "'"


def own_metrics(overrides: Sequence[str], run: Run) -> list[str]:
    """The metrics that a run was trained with, unless others are named."""
    named = any(line.startswith("metrics=") for line in overrides)
    return [] if named else [f"metrics={run.record['choices']['metrics']}"]


def beside_metrics(composed: Composed) -> dict[str, Any]:
    """The configuration but for the metrics, which may have options that must be given."""
    config = copy.deepcopy(composed.config)
    config.metrics = {}
    return plain(Composed(config, composed.choices, composed.overrides, composed.config_dir))


def without_metrics(overrides: Sequence[str]) -> tuple[str, ...]:
    """Without what changes the metrics' own options, which depend on the run's choice of metrics."""
    return tuple(line for line in overrides if not option(line).startswith("metrics."))
