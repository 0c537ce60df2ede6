"""The end of training where more of it makes the averaged weights worse."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from denoiselab.callbacks.base import Evaluation, log
from denoiselab.callbacks.checkpoints import Checkpoints
from denoiselab.data.base import Samples
from denoiselab.metrics.loss_by_t import held_out_losses
from denoiselab.module import Diffusion
from denoiselab.progress import say


class EarlyStopping(Evaluation):
    """Ends training when the held-out loss of the EMA weights has had no new best for ``patience`` measurements.

    Each held-out sample is seen at fixed times and noise addressed by its id, so that successive losses differ by the
    weights alone, and every rank comes to the same decision. The best weights are kept as best.ckpt, which is what the
    run's directory then stands for. Logs early_stopping/loss and early_stopping/best.

    Args:
        held_out: samples.
        saving: writes checkpoints.
        patience: measurements, >= 1.
        every: optimizer steps between them.
    """

    can_wait = False

    def __init__(self, held_out: Samples, saving: Checkpoints, patience: int, every: int = 500):
        super().__init__(every)
        self.held_out, self.saving, self.patience = held_out, saving, patience
        self.best, self.best_step, self.since, self.stopped = float("inf"), 0, 0, False

    def due(self, trainer: pl.Trainer, module: Diffusion) -> bool:
        """On the cadence alone: where the last step is off it, a longer run would have one more measurement there."""
        return module.stepped and trainer.global_step % self.every == 0

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        _, total = held_out_losses(
            module.ema.model,  # pyright: ignore[reportArgumentType]
            module.schedule,
            self.held_out,
            loss=module.loss,
            rank=trainer.global_rank,
            world=trainer.world_size,
            device=module.device,
        )
        total = trainer.strategy.reduce(total, reduce_op="sum")
        loss = float(total[0] / total[1])
        better = loss < self.best
        self.since = 0 if better else self.since + 1
        if better:
            self.best, self.best_step = loss, trainer.global_step
        log(trainer, {"early_stopping/loss": loss, "early_stopping/best": self.best})
        if better:
            self.saving.keep_best(trainer, module)
        if self.since >= self.patience:
            self.stopped = trainer.should_stop = True
            self.saving.run(trainer, module)
            if trainer.is_global_zero:
                say(
                    f"stopped at step {trainer.global_step}: the held-out loss was best at step {self.best_step} "
                    f"({self.best:.4g}) and not since; best.ckpt has those weights"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "since": self.since, "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.since, self.stopped = state_dict["since"], state_dict["stopped"]
