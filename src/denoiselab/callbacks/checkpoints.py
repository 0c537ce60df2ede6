"""Saving the run's state: on a cadence, when a signal asks, and at the end."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from denoiselab import checkpoint
from denoiselab.callbacks.base import Periodic
from denoiselab.callbacks.finite import stop_if_not_finite, stop_if_weights_are_not_finite
from denoiselab.errors import CannotSave, Interrupted
from denoiselab.loggers import JsonLines
from denoiselab.module import Diffusion
from denoiselab.progress import say
from denoiselab.resuming import check_training_state
from denoiselab.version import __version__

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
        notice: seconds between a scheduler's signal and the end; None where there is none. It is said once if a save
            and two steps take more than half of it.
    """

    def __init__(
        self,
        folder: Path,
        record: dict[str, Any],
        every: int = 500,
        max_failures: int = 3,
        notice: float | None = None,
    ):
        super().__init__(every)
        self.notice, self.began, self.step_seconds = notice, 0.0, 0.0
        self.folder, self.record, self.max_failures = Path(folder) / "checkpoints", record, max_failures
        self.failures, self.signum = 0, 0
        self.owner = os.getpid()
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._check_space(trainer, pl_module)
        self.handlers = {number: signal.signal(number, self._flag) for number in SIGNALS}
        pl_module.told, pl_module.owed = lambda: bool(self.signum), []

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._give_back()
        if self.signum:  # it came after the last step was over: what follows training is not to begin
            raise Interrupted(self.signum)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """Signals to whoever took them before."""
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

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.step_seconds = (time.perf_counter() - self.began) * trainer.accumulate_grad_batches
        if pl_module.stepped and (signum := self._agreed(trainer, pl_module)):
            if trainer.is_global_zero:
                say(f"saving step {trainer.global_step} before stopping")
            try:
                self.save(trainer, pl_module, checkpoint.NEW, again=False)
            except CannotSave as error:  # it is asked to end all the same, and goes on from what was saved before
                say(str(error))
            raise Interrupted(signum)
        if pl_module.stepped and self.reads_each_step(trainer, pl_module):
            stop_if_not_finite(pl_module)
        super().on_train_batch_end(trainer, pl_module, *args)

    @staticmethod
    def reads_each_step(trainer: pl.Trainer, module: Diffusion) -> bool:
        """Whether asking the device costs no wait that is not there already: on a CPU, which has none, and on several
        ranks, which agree on signals after each step. One GPU is asked when a row is due or a file saved."""
        return module.device.type == "cpu" or trainer.world_size > 1

    def _agreed(self, trainer: pl.Trainer, module: Diffusion, number: int | None = None) -> int:
        """The greatest number of any rank, by default of its signal; a collective on CPU and GPU alike."""
        number = self.signum if number is None else number
        if trainer.world_size == 1:
            return number
        flag = torch.tensor(number, device=module.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        again = trainer.global_step < trainer.max_steps and not trainer.should_stop
        self.save(trainer, module, checkpoint.NEW, again)

    def keep_best(self, trainer: pl.Trainer, module: Diffusion) -> None:
        """Write best.ckpt: in its place at once, as a run that is killed goes on from any file, whatever its name."""
        self.save(trainer, module, "best.ckpt", again=False)

    def save(self, trainer: pl.Trainer, module: Diffusion, name: str, again: bool) -> None:
        """Write a file; a new one then becomes the last.

        Args:
            trainer, module: the run's.
            name: of the file.
            again: whether there is a later state to save instead, if this one cannot be.

        Raises:
            NonFiniteLoss: it would hold values that are not finite; on every rank.
            CannotSave: it failed for good; on every rank.
        """
        stop_if_not_finite(module)
        stop_if_weights_are_not_finite(module)
        steps = [self._prepare, lambda trainer: self._write(trainer, name)]
        steps += [self._rotate] if name == checkpoint.NEW else []
        begin = time.perf_counter()
        with module.clock.occupied():
            error = next((found for act in steps if (found := self._tried(act, trainer, module))), None)
        if error is None:
            self.failures = 0
            if trainer.is_global_zero:
                self._compare_with_notice(time.perf_counter() - begin)
            return
        self.failures += 1
        message = (
            f"cannot save {self.folder / name}: {error.strerror or error}; it takes about "
            f"{self._size(trainer, module):,} bytes, {free(self.folder):,} are free"
        )
        if self.failures >= self.max_failures:
            raise CannotSave(f"{message}; gave up after {self.failures} failures") from error
        if not again:
            raise CannotSave(message) from error
        if trainer.is_global_zero:
            say(f"{message}; training goes on and tries again")

    def _compare_with_notice(self, seconds: float) -> None:
        """Say once that the time between a scheduler's signal and the end is short for what must be done in it."""
        need = seconds + 2 * self.step_seconds
        if self.notice is not None and need > self.notice / 2:
            say(
                f"warning: launcher.grace={self.notice:g}: saving took {seconds:.1f} s, a step {self.step_seconds:.1f} "
                f"s; a run that is told to stop may not save in time; need at least {math.ceil(2 * need)}"
            )
            self.notice = None

    def _tried(self, act: Callable[[pl.Trainer], None], trainer: pl.Trainer, module: Diffusion) -> OSError | None:
        """What came of a part of saving that rank 0 does while others wait: its error, or that it had one."""
        own = None
        try:
            act(trainer)
        except OSError as error:
            own = error
        failed = self._agreed(trainer, module, int(own is not None))
        return (own or OSError(errno.EIO, "rank 0 could not write")) if failed else None

    def _prepare(self, trainer: pl.Trainer) -> None:
        """The rows of what is saved are on the disk before it; and the run's folder is still the one that it was."""
        if trainer.is_global_zero:
            (self.folder.parent / "identity.json").stat()
            for logger in trainer.loggers:
                if isinstance(logger, JsonLines):
                    logger.sync()

    def _write(self, trainer: pl.Trainer, name: str) -> None:
        try:
            trainer.save_checkpoint(self.folder / name)
        except OSError:
            if trainer.world_size > 1:
                trainer.strategy.barrier()  # which the other ranks are waiting at
            raise

    def _rotate(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            checkpoint.rotate(self.folder)

    def _size(self, trainer: pl.Trainer, module: Diffusion) -> int:
        """About how many bytes a checkpoint takes."""
        state = [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        tensors = [*module.state_dict().values(), *(state or [*trained, *trained])]  # before the first step: Adam's two
        estimate = sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
        return max([estimate, *(path.stat().st_size for path in self.folder.glob("last.ckpt"))])

    def _check_space(self, trainer: pl.Trainer, module: Diffusion) -> None:
        """There is room for the last checkpoint, the one before, and the one that is being written."""
        there = [path for path in self.folder.glob("*.ckpt") if path.stem in ("last", "previous", "new")]
        need, have = (3 - len(there)) * self._size(trainer, module), free(self.folder)
        if have < need:
            raise CannotSave(
                f"{self.folder}: checkpoints need {need:,} more bytes, {have:,} are free; make space, or name another "
                "output_dir"
            )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["denoiselab"] = {
            **self.record,
            "samples_seen": trainer.global_step * pl_module.batch_size,
            "fingerprint": pl_module.schedule.fingerprint,
            "made_on": made_on(trainer, pl_module),
            "release": __version__,
            **({"owed": [*pl_module.owed]} if pl_module.owed else {}),
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        check_training_state(checkpoint, trainer, pl_module)
        pl_module.owed = [*checkpoint["denoiselab"].get("owed", [])]
        now, before = made_on(trainer, pl_module), checkpoint["denoiselab"].get("made_on")
        changed = [key for key in now if before.get(key) != now[key]] if isinstance(before, dict) else []
        if changed and trainer.is_global_zero:
            was, goes_on = (", ".join(f"{key} {found.get(key)}" for key in changed) for found in (before, now))
            say(
                f"note: trained to step {checkpoint['global_step']} with {was}, goes on with {goes_on}: the same "
                "samples in the same order, but not bit for bit as if it had gone on unchanged"
            )


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be; 0 if nobody knows."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def made_on(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """What the bits of a run depend on beside its options: the noise is drawn rank by rank and part by part."""
    device = module.device
    return {
        "ranks": trainer.world_size,
        "accumulate": trainer.accumulate_grad_batches,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
    }
