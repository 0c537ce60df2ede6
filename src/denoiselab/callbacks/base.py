"""What callbacks share: a cadence in optimizer steps, and where their numbers and pictures go."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from PIL import Image

from denoiselab.loggers import Dashboard, JsonLines
from denoiselab.loggers.base import flat
from denoiselab.module import Diffusion


def log(trainer: pl.Trainer, values: dict[str, Any], step: int | None = None) -> None:
    """Send numbers and lists of numbers to every logger; a list becomes name/00, name/01, ... on dashboards."""
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        if isinstance(logger, Dashboard):
            logger.row(values, step)
        else:
            logger.log_metrics(values if isinstance(logger, JsonLines) else flat(values), step)


def show(trainer: pl.Trainer, folder: Path, name: str, picture: Image.Image) -> None:
    """Keep a picture as RUN/pictures/NAME_STEP.png and send it to the dashboards."""
    step = trainer.global_step
    path = folder / "pictures" / f"{name}_{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    send(trainer, name, picture)


def send(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Send a picture to the dashboards."""
    for logger in trainer.loggers:
        if isinstance(logger, Dashboard):
            logger.show(name, picture, trainer.global_step)


def send_table(trainer: pl.Trainer, name: str, table: dict[str, list[Any]]) -> None:
    """Send a table, columns by name, to the dashboards that show tables."""
    for logger in trainer.loggers:
        if isinstance(logger, Dashboard):
            logger.table(name, table, trainer.global_step)


class Periodic(pl.Callback):
    """Calls ``run`` after every ``every``-th optimizer step and after the last.

    Args:
        every: optimizer steps, >= 1.
    """

    def __init__(self, every: int):
        if every < 1:
            raise ValueError(f"every={every}: need a number of steps >= 1")
        self.every = every

    def due(self, trainer: pl.Trainer, module: Diffusion) -> bool:
        step = trainer.global_step
        return module.stepped and (step % self.every == 0 or step == trainer.max_steps)

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        raise NotImplementedError

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.due(trainer, pl_module):
            self.run(trainer, pl_module)


class Evaluation(Periodic):
    """Periodic work that is not training: the training clock stands still during ``run``."""

    generates: ClassVar[bool | None] = None
    """Whether the model that it looks at can be sampled or is an autoencoder; None for any."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.due(trainer, pl_module):
            with pl_module.clock.paused():
                self.run(trainer, pl_module)
