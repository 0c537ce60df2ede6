"""How fast training is."""

from __future__ import annotations

import lightning.pytorch as pl

from denoiselab.callbacks.base import Periodic, log
from denoiselab.module import Diffusion


class Throughput(Periodic):
    """speed/steps_per_second and speed/samples_per_second of training itself, evaluations left out, and
    speed/evaluation_share, the part of the wall clock that evaluations took.

    Args:
        every: optimizer steps between rows.
    """

    def __init__(self, every: int = 100):
        super().__init__(every)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Diffusion) -> None:  # type: ignore[override]
        self._mark(trainer, pl_module)

    def _mark(self, trainer: pl.Trainer, module: Diffusion) -> None:
        self.step, self.seconds, self.paused = (
            trainer.global_step,
            module.clock.seconds(),
            module.clock.paused_for,
        )

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        steps, seconds = trainer.global_step - self.step, module.clock.seconds() - self.seconds
        if not steps:
            return
        paused = module.clock.paused_for - self.paused
        log(
            trainer,
            {
                "speed/steps_per_second": steps / seconds,
                "speed/samples_per_second": steps * module.batch_size / seconds,
                "speed/evaluation_share": paused / (seconds + paused),
            },
        )
        self._mark(trainer, module)
