"""Saving the run's state: on a cadence, when a signal asks, and at the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from denoiselab.callbacks.base import Periodic
from denoiselab.callbacks.metrics import stop_if_not_finite
from denoiselab.errors import CannotSave, Interrupted
from denoiselab.module import Diffusion

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Checkpoints(Periodic):
    """RUN/checkpoints/last.ckpt after every ``every`` steps, the one before kept as previous.ckpt; best.ckpt if told.

    Saving happens only after an optimizer step is complete, EMA and all. A signal sets a flag that is acted on there
    (on any rank: the flag is shared), then the run ends with status 128 + signal; a second Ctrl-C ends it at once.

    Args:
        folder: the run directory.
        record: primitives that make the file usable alone: configuration, identity, shapes.
        every: optimizer steps between saves.
        max_failures: saves that may fail in a row before the run ends with status 74.
    """

    def __init__(self, folder: Path, record: dict[str, Any], every: int = 500, max_failures: int = 3):
        super().__init__(every)
        self.folder, self.record, self.max_failures = Path(folder) / "checkpoints", record, max_failures
        self.failures, self.signum = 0, 0
        self.owner = os.getpid()
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.handlers = {number: signal.signal(number, self._flag) for number in SIGNALS}

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _flag(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # loader workers inherit handlers and must not act on them
            return
        if signum == signal.SIGINT and self.signum:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(self.owner, signal.SIGINT)
        self.signum = signum

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.stepped and (signum := self._agreed(trainer, pl_module)):
            if trainer.is_global_zero:
                print(f"saving step {trainer.global_step} before stopping", file=sys.stderr)
            self.run(trainer, pl_module)
            raise Interrupted(signum)
        super().on_train_batch_end(trainer, pl_module, *args)

    def _agreed(self, trainer: pl.Trainer, module: Diffusion) -> int:
        """The signal that any rank has received; a collective on CPU and GPU alike."""
        if trainer.world_size == 1:
            return self.signum
        flag = torch.tensor(self.signum, device=module.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        self.save(trainer, module, (("last", "previous"), ("new", "last")))

    def keep_best(self, trainer: pl.Trainer, module: Diffusion) -> None:
        """Write best.ckpt."""
        self.save(trainer, module, (("new", "best"),))

    def save(self, trainer: pl.Trainer, module: Diffusion, moves: Sequence[tuple[str, str]]) -> None:
        """Write new.ckpt, then rename files."""
        stop_if_not_finite(module)
        try:
            trainer.save_checkpoint(self.folder / "new.ckpt")
            if trainer.is_global_zero:
                for old, name in moves:
                    for suffix in ("ckpt", "ckpt.sha256"):
                        if (path := self.folder / f"{old}.{suffix}").exists():
                            path.replace(self.folder / f"{name}.{suffix}")
            self.failures = 0
        except OSError as error:
            if trainer.world_size > 1:
                trainer.strategy.barrier()  # which the other ranks are waiting at
            self.failures += 1
            message = f"cannot save in {self.folder}: {error.strerror or error}"
            if self.failures >= self.max_failures:
                raise CannotSave(f"{message}; gave up after {self.failures} failures") from error
            print(f"{message}; training goes on and tries again", file=sys.stderr)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["denoiselab"] = {
            **self.record,
            "samples_seen": trainer.global_step * pl_module.batch_size,
            "fingerprint": pl_module.schedule.fingerprint,
        }
