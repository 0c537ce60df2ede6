"""Weights & Biases: a run of its own per job, complete in each of its folders, and never in the way of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from denoiselab.errors import one_line
from denoiselab.loggers.base import Dashboard
from denoiselab.loggers.evaluations import Evaluations
from denoiselab.loggers.facts import Facts
from denoiselab.loggers.reach import unreachable

STEP = "trainer/global_step"
"""The axis of everything, in optimizer steps."""

SUMMARIES = {
    **dict.fromkeys(("train/loss", "train/mse", "val/loss", "val/loss_raw", "val/mse"), "min,last"),
    **dict.fromkeys(("val/psnr", "val/ssim", "train/grad_norm"), "max,last"),
    **dict.fromkeys(("speed/steps_per_second", "speed/samples_per_second", "speed/evaluation_share"), "mean,last"),
}
"""What a run's line in a table says of a scalar; the last value of all others."""

INIT_SECONDS, FINISH_SECONDS = 10.0, 120.0
"""The longest wait for the server at the start and at the end of a run; what was not sent stays on the disk."""


class Wandb(Dashboard, WandbLogger):
    """One wandb run per job, its id the run's hash, on the axis trainer/global_step.

    Numbers are logged as they are; lists by t are hidden scalars, a table and a picture. wandb's own step only counts
    calls, and is never given. A run that goes on keeps its id. Without a connection wandb cannot know what came before,
    so an offline folder is filled from metrics.jsonl, RUN/pictures and RUN/diagnostics first: each folder is the whole
    run, with every step once. With one, what the server lacks is sent, and what it has of a stretch that is made again
    is not sent twice.

    Whether the server can be reached is tried for 3 s before wandb is started; if not, or if it does not take the run
    within 10 s, the run is kept offline. Should wandb's service die, another one is started offline. Either is one
    warning; training goes on whatever happens here.

    Under a sweep's agent the run is the agent's: its id and project are what the server gave it, and the run's own hash
    stands in the configuration.

    Args:
        save_dir: the run directory.
        id: the run's hash.
        name: what it is called.
        facts: what it is; its group is the run's.
        step: that it goes on from.
        project, entity: on the server.
        offline: true for no connection whatever happens; `wandb sync RUN/wandb/latest-run` uploads later.
        options: further arguments of wandb.init.
    """

    def __init__(
        self,
        save_dir: Path,
        id: str,
        name: str,
        facts: Facts,
        step: int = 0,
        project: str = "denoiselab",
        entity: str | None = None,
        offline: bool = True,
        **options: Any,
    ):
        super().__init__(
            name=name,
            save_dir=str(save_dir.resolve()),  # its service may stand in another folder
            id=id,
            project=project,
            **{
                "entity": entity,
                "group": facts.group,
                "job_type": "train",
                "tags": facts.tags,
                "config": facts.shown(id),
                **options,
            },
        )
        self.folder, self.from_step, self.offline = Path(save_dir), step, offline
        self.arrived = -1
        """The step up to which rows are there; those are not sent again."""
        self.newest = step
        self.opened, self.lost = 0, False
        self.waiting = "WANDB_SWEEP_ID" in os.environ or not (self.folder / "wandb").is_dir()
        self.defined: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """wandb's run, made when first asked for; nothing where that is impossible."""
        if self._experiment is None and not self.lost:
            try:
                self._open()
            except Exception as error:  # of whatever kind: training does not end for a dashboard
                self._give_up(error)
        return self._experiment

    def _open(self) -> None:
        _leave_service()
        mode = self._mode()
        try:
            run = self._start(mode)
        except Exception as error:
            if mode != "online":
                raise
            self._keep_offline(one_line(error))
            _end_service()  # which would hold the id, and wait
            run = self._start("offline")
        if sweep := os.environ.get("WANDB_SWEEP_ID"):
            _say(f"run {run.id} of sweep {sweep}; its own address is {self._id}")
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        there = run.summary.get(STEP) if run.resumed else None
        self.arrived = there if isinstance(there, int) else -1
        again, self._experiment = self.opened > 0, run
        self.opened += 1
        self.defined.clear()
        self.replay(self.folder, self.arrived, self.newest if again else self.from_step)

    def _mode(self) -> str:
        """online, offline or disabled."""
        import wandb

        asked = os.environ.get("WANDB_MODE", "online")
        if asked != "disabled" and not self.offline and asked not in ("offline", "dryrun"):
            why = unreachable(wandb.setup().settings)
            if why is None:
                return "online"
            self._keep_offline(why)
        return "disabled" if asked == "disabled" else "offline"

    def _keep_offline(self, why: str) -> None:
        _say(f"warning: {why[:200]}; this run is kept offline")
        self.offline = True

    def _start(self, mode: str) -> Any:
        import wandb

        given = {name: value for name, value in self._wandb_init.items() if name != "anonymous"}  # which warns
        if os.environ.get("WANDB_SWEEP_ID"):  # the server has said which run of which project this is
            given |= {"id": None, "project": None, "entity": None}
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            ignore_globs=("*.patch",),  # changes that are not committed may hold what nobody meant to publish
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            reinit="create_new",
        )
        given["resume"] = "allow" if mode == "online" else None  # offline there is nothing to resume
        return wandb.init(**{"mode": mode, "settings": settings, **given})

    def _tell(self, what: Callable[[Any], object], again: bool = False) -> None:
        """Call with wandb's run; if its service has died, start another, which is filled from the run's folder.

        Args:
            what: logs something.
            again: whether to call it in the new one too: what was logged is in no file yet.
        """
        try:
            if (run := self.experiment) and not self.lost:
                what(run)
        except Exception as error:  # of whatever kind: training does not end for a dashboard
            if self.opened > 1:
                self._give_up(error)
                return
            _say(f"warning: {one_line(error)[:200]}; it goes on in another folder, offline")
            _end_service()
            self._experiment, self.offline = None, True
            self._tell(what if again else lambda run: None)

    def _give_up(self, error: Exception) -> None:
        self.lost, self._experiment = True, None
        _say(f"warning: {one_line(error)[:200]}; nothing more is logged there, metrics.jsonl goes on")

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        step = self.newest if step is None else step
        self._log(metrics, step)

    @rank_zero_only
    def show(self, name: str, picture: Image.Image, step: int) -> None:
        import wandb

        self._log({f"pictures/{name}": [wandb.Image(picture, caption=f"step {step}")]}, step)

    @rank_zero_only
    def table(self, name: str, table: dict[str, list[Any]], step: int) -> None:
        self._log({f"tables/{name}": _table(table)}, step)

    @rank_zero_only
    def evaluated(self, found: Evaluations) -> None:
        values = {**found.values, "evaluation/results": _table(found.table), STEP: found.step}
        self._tell(lambda run: run.log(values), again=True)

    @rank_zero_only
    def close(self, status: int) -> None:
        if self._experiment is None:
            return
        folder, online = Path(self._experiment.dir).parent, not self._experiment.offline
        self._tell(lambda run: run.finish(exit_code=status))
        self._experiment, self.lost = None, True
        _say(f"`wandb sync {folder}` uploads this run" if not online else f"run {self._id} has ended")

    def _log(self, values: dict[str, Any], step: int) -> None:
        self.newest = max(self.newest, step)

        def log(run: Any) -> None:
            if step > self.arrived:
                self._define(run, values)
                run.log({**values, STEP: step})

        self._tell(log)

    def _define(self, run: Any, values: dict[str, Any]) -> None:
        """Names are defined one by one: of several patterns that match a name wandb takes any."""
        for name in values.keys() - self.defined:
            if name in SUMMARIES:
                run.define_metric(name, step_metric=STEP, summary=SUMMARIES[name])
            elif name.startswith("buckets/"):
                run.define_metric(name, step_metric=STEP, hidden=True)
            self.defined.add(name)


def _table(columns: dict[str, list[Any]]) -> Any:
    import wandb

    rows: list[Any] = [list(row) for row in zip(*columns.values(), strict=True)]
    return wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)


def _leave_service() -> None:
    """One that another process started, and whose address is inherited, may be on another machine or end sooner."""
    if f"-{os.getpid()}-" not in os.environ.get("WANDB_SERVICE", ""):
        os.environ.pop("WANDB_SERVICE", None)


def _end_service() -> None:
    """End wandb's service, dead or waiting for a server; a new one starts when needed."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _say(line: str) -> None:
    print(f"wandb: {line}", file=sys.stderr, flush=True)
