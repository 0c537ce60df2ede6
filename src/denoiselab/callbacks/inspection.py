"""A diagnostic during training: on its cadence, within its share of the training time."""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from denoiselab.callbacks.base import Evaluation, log, send, send_table
from denoiselab.diagnostics.base import Diagnostic
from denoiselab.errors import UserError, one_line
from denoiselab.inspection import Kept
from denoiselab.module import Diffusion
from denoiselab.progress import say


class OutOfTime(Exception):
    """A look took longer than its budget."""


class Inspection(Evaluation):
    """Lets a diagnostic look at the EMA weights, on rank 0.

    A look may begin when the share of the training time that is left to it covers what the last one took, twice that
    if the last was cut; it is cut short where it takes more than is left. Both are said, and counted as
    diagnostics/NAME/left_out, and so is what turns out to be impossible to look at: no training ends for that. What is
    not spent is kept for later looks.

    Args:
        name: of the diagnostic.
        diagnostic: its cadence and budget are its own.
        inspect: looks at a module with this progress (``Subject``'s), and keeps what was found.
    """

    alone = True

    def __init__(
        self,
        name: str,
        diagnostic: Diagnostic,
        inspect: Callable[[pl.Trainer, Diffusion, Callable[[str, int], Callable[[int], object]]], Kept],
    ):
        super().__init__(diagnostic.every)
        self.name, self.share, self.inspect = name, diagnostic.share, inspect
        self.spent, self.need, self.left_out = 0.0, 0.0, 0

    @property
    def key(self) -> str:
        return self.name

    @rank_zero_only
    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        left = float("inf") if self.share is None else self.share * module.clock.seconds() - self.spent
        if left < self.need or left <= 0:
            self._say_left_out(trainer, f"it would take about {self.need:.2g} s, and {self._budget(left)}")
            return
        began = time.perf_counter()

        def told(what: str, n: int) -> Callable[[int], object]:
            def tell(done: int) -> None:
                if time.perf_counter() - began > left:
                    raise OutOfTime

            tell(0)
            return tell

        was_training = module.training
        module.eval()
        try:
            kept = self.inspect(trainer, module, told)
        except OutOfTime:
            took = time.perf_counter() - began
            self.spent, self.need = self.spent + took, 2 * took
            self._say_left_out(trainer, f"it was cut after {took:.2g} s, and {self._budget(left)}")
            return
        except (UserError, OSError) as error:  # training goes on, though it cannot be looked at, or a file not written
            self.spent += time.perf_counter() - began
            self._say_left_out(trainer, one_line(error))
            return
        finally:
            module.train(was_training)
        took = time.perf_counter() - began
        self.spent, self.need = self.spent + took, took
        prefix = f"diagnostics/{self.name}"
        values = {f"{prefix}/{record.name}": record.value for record in kept.finding.records}
        log(trainer, {**values, f"{prefix}/alarms": len(kept.finding.alarms), f"{prefix}/seconds": took})
        send(trainer, self.name, kept.picture)
        send_table(trainer, self.name, kept.finding.table)
        for alarm in kept.finding.alarms:
            say(f"! {self.name}, step {trainer.global_step}: {alarm}")

    def _budget(self, left: float) -> str:
        percent = f"{100 * (self.share or 0):g}%"
        return (
            f"of its {percent} of the training time {max(left, 0):.2g} s are left; "
            f"diagnostics.{self.name}.budget=null sets no limit"
        )

    def _say_left_out(self, trainer: pl.Trainer, why: str) -> None:
        self.left_out += 1
        log(trainer, {f"diagnostics/{self.name}/left_out": self.left_out})
        say(f"{self.name}: left out at step {trainer.global_step}: {why}")
