"""A bar with an estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from denoiselab.callbacks.metrics import TrainingMetrics
from denoiselab.module import Diffusion

LINE_SECONDS = 15.0


class ProgressBar(pl.Callback):
    """Steps done of max_steps, the last logged loss, steps per second and the time left; reads nothing from the
    device.

    Args:
        metrics: whose last loss is shown.
    """

    def __init__(self, metrics: TrainingMetrics) -> None:
        self.metrics = metrics
        self.bar: Progress | None = None
        self.next_line = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.first, self.next_line = trainer.global_step, time.perf_counter() + LINE_SECONDS
        if sys.stderr.isatty():
            from rich.console import Console

            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4g}  {task.fields[rate]:.1f} steps/s"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self.task = self.bar.add_task(
                "", total=trainer.max_steps, completed=self.first, rate=0.0, loss=float("nan")
            )
            self.bar.start()

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        module: Diffusion = pl_module
        if self.bar is not None:
            rate = self._rate(trainer, module)
            self.bar.update(self.task, completed=trainer.global_step, rate=rate, loss=self.metrics.latest)
        elif time.perf_counter() > self.next_line:
            self.next_line = time.perf_counter() + LINE_SECONDS
            rate = self._rate(trainer, module)
            left = (trainer.max_steps - trainer.global_step) / rate if rate else float("inf")
            where = f"step {trainer.global_step}/{trainer.max_steps}, loss {self.metrics.latest:.4g}"
            print(
                f"{where}, {rate:.1f} steps/s, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _rate(self, trainer: pl.Trainer, module: Diffusion) -> float:
        return (trainer.global_step - self.first) / max(module.clock.seconds(), 1e-9)

    @rank_zero_only
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
