"""The scalars of training: loss, learning rate, gradient norm."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from denoiselab import progress
from denoiselab.callbacks.base import Periodic, log, of_all_ranks, own_of
from denoiselab.callbacks.finite import stop_if_not_finite
from denoiselab.errors import CheckpointError
from denoiselab.module import Diffusion


class TrainingMetrics(Periodic):
    """train/loss and train/mse (means since the last row, over ranks), train/grad_norm and train/lr (now); and
    train/null_share, the share of samples since the last row whose condition was dropped, where any can be. The first
    row also has speed/launch_seconds: what starting took, from the process's beginning to the end of its first step.

    Sums are kept on the device; a row costs one read. A loss that is not finite ends the run before it is in a row.

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
        self.mse = float("nan")
        """train/mse of the last row."""
        self.launch: float | None = None
        """Seconds that starting took, until they are in a row."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if progress.began is not None:
            self.launch, progress.began = time.time() - progress.began, None
            if trainer.is_global_zero:
                progress.say(f"first step {self.launch:.1f} s after the process began")
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
        self.sums, self.latest, self.mse = None, loss / count, mse / count
        values = {
            "train/loss": self.latest,
            "train/mse": self.mse,
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
        return {"sums": None if self.sums is None else of_all_ranks(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sums = state_dict["sums"]
        if sums is not None:
            if not isinstance(sums, Tensor) or sums.ndim not in (1, 2) or not 3 <= sums.shape[-1] <= 5:
                raise CheckpointError("callbacks.TrainingMetrics: its sums in the checkpoint are not those of a run")
            sums = own_of(sums if sums.ndim == 2 else sums[None])  # older runs kept rank 0's alone, and three of them
            self.sums = F.pad(sums, (0, 5 - len(sums)))
