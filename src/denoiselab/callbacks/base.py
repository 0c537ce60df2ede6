"""What callbacks share: a cadence in optimizer steps, and where their numbers and pictures go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor, distributed

from denoiselab.denoiser import Denoiser
from denoiselab.errors import one_line
from denoiselab.files import write_atomic
from denoiselab.loggers import Dashboard, JsonLines
from denoiselab.loggers.base import flat
from denoiselab.module import Diffusion
from denoiselab.progress import say


def log(trainer: pl.Trainer, values: dict[str, Any], step: int | None = None) -> None:
    """Send numbers and lists of numbers to every logger; a list becomes name/00, name/01, ... on dashboards."""
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        if isinstance(logger, Dashboard):
            logger.row(values, step)
        else:
            logger.log_metrics(values if isinstance(logger, JsonLines) else flat(values), step)


def show(trainer: pl.Trainer, folder: Path, name: str, picture: Image.Image) -> None:
    """Keep a picture as RUN/pictures/NAME_STEP.png and send it to the dashboards; no training ends for want of one."""
    path = folder / "pictures" / f"{name}_{trainer.global_step:08d}.png"
    try:
        write_atomic(path, lambda file: picture.save(file, "png"))
    except OSError as error:
        say(f"warning: {one_line(error)}; the picture is left out")
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


def of_all_ranks(sums: Tensor) -> Tensor:
    """(ranks, ...): sums that each rank keeps of its own samples, for the checkpoint, which rank 0 writes. Every rank
    calls it."""
    if not distributed.is_initialized():
        return sums[None]
    found = [torch.empty_like(sums) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, sums.contiguous())
    return torch.stack(found)


def own_of(sums: Tensor) -> Tensor:
    """What of_all_ranks has of this rank; of another number of ranks, rank 0 takes all."""
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if len(sums) == world:
        return sums[rank]
    total = sums.sum(0)
    return total if rank == 0 else torch.zeros_like(total)


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


class Cut(BaseException):
    """The run was told to stop. Not an Exception, so that no evaluation swallows it."""


class Evaluation(Periodic):
    """Periodic work that is not training: the training clock stands still during ``run``.

    It is left at its next call of a network once the run is told to stop, so that the state is saved in time. The
    checkpoint says that it is owed, and the run makes it when it goes on.
    """

    generates: ClassVar[bool | None] = None
    """Whether the model that it looks at can be sampled or is an autoencoder; None for any."""

    alone: ClassVar[bool] = False
    """Whether rank 0 does it while the others wait. What all do is not left: all would have to at the same call."""

    can_wait: ClassVar[bool] = True
    """Whether it may be made later; not where training goes by it."""

    @property
    def key(self) -> str:
        """Of this among the callbacks of a run."""
        return type(self).__name__

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.key in pl_module.owed:
            self._make(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.due(trainer, pl_module):
            self._make(trainer, pl_module)

    def _make(self, trainer: pl.Trainer, module: Diffusion) -> None:
        try:
            with module.clock.paused(), self._left_when_told(trainer, module):
                self.run(trainer, module)
        except Cut:
            module.owed.append(self.key)
            say(f"{self.key}: left at step {trainer.global_step}; it is made when the run goes on")

    @contextmanager
    def _left_when_told(self, trainer: pl.Trainer, module: Diffusion) -> Iterator[None]:
        def leave(*_: Any) -> None:
            if module.told() and threading.current_thread() is threading.main_thread():
                raise Cut

        can = self.can_wait and (self.alone or trainer.world_size == 1)
        denoisers = [one for one in module.modules() if isinstance(one, Denoiser)] if can else []
        hooks = [denoiser.net.register_forward_pre_hook(leave) for denoiser in denoisers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
