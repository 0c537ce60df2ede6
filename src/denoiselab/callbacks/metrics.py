"""The scalars of training: loss, learning rate, gradient norm."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from denoiselab import progress
from denoiselab.callbacks.base import Periodic, log
from denoiselab.errors import NonFiniteLoss
from denoiselab.module import Diffusion


class TrainingMetrics(Periodic):
    """train/loss and train/mse (means since the last row, over ranks), train/grad_norm and train/lr (now); and
    train/null_share, the share of samples since the last row whose condition was dropped, where any can be. The first
    row also has speed/launch_seconds: what starting took, from the process's beginning to the end of its first step.

    Sums are kept on the device; a row costs one read. A loss that is not finite ends the run here, and before every
    checkpoint, so that none is ever saved.

    Args:
        every: optimizer steps between rows.
    """

    def __init__(self, every: int = 50):
        super().__init__(every)
        self.sums: Tensor | None = None
        """Since the last row: losses, mean squared errors and steps; samples whose condition was dropped, and those
        with one."""
        self.latest = float("nan")
        """train/loss of the last row, for the progress bar."""
        self.launch: float | None = None
        """Seconds that starting took, until they are in a row."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if progress.began is not None:
            self.launch, progress.began = time.time() - progress.began, None
            if trainer.is_global_zero:
                print(f"first step {self.launch:.1f} s after the process began", file=sys.stderr, flush=True)
        outputs = args[0]
        loss, dropped = outputs["loss"].detach().double(), outputs["dropped"]
        one, none = torch.ones_like(loss), torch.zeros_like(loss)
        nulls = [none, none] if dropped is None else [dropped.sum().double(), one * len(dropped)]
        row = torch.stack([loss, outputs["parts"]["mse"].mean().double(), one, *nulls])
        self.sums = row if self.sums is None else self.sums.to(row.device) + row
        super().on_train_batch_end(trainer, pl_module, *args)

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        stop_if_not_finite(module)
        assert self.sums is not None
        loss, mse, count, dropped, samples = trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
        self.sums, self.latest = None, loss / count
        values = {
            "train/loss": self.latest,
            "train/mse": mse / count,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if samples:
            values["train/null_share"] = dropped / samples
        if module.gradient_norm is not None:
            values["train/grad_norm"] = float(module.gradient_norm)
        if self.launch is not None:
            values["speed/launch_seconds"], self.launch = self.launch, None
        log(trainer, values)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sums = state_dict["sums"]
        self.sums = None if sums is None else F.pad(sums, (0, 5 - len(sums)))  # older runs kept three


def stop_if_not_finite(module: Diffusion) -> None:
    """Raise NonFiniteLoss if any step so far had a loss or a gradient that is not a number (one device read)."""
    if module.bad_step is not None and (step := int(module.bad_step)) >= 0:
        lr = module.trainer.optimizers[0].param_groups[0]["lr"]
        raise NonFiniteLoss(
            f"non-finite loss or gradient at step {step} (lr {lr:.3g}); "
            "no checkpoint was made since; try a lower optimizer.lr or trainer.gradient_clip=1"
        )
