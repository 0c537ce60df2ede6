"""The loss as a function of t, in buckets."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from denoiselab.callbacks.base import Evaluation, log, of_all_ranks, own_of
from denoiselab.data.base import Data
from denoiselab.metrics.loss_by_t import Buckets, held_out_losses
from denoiselab.module import Diffusion


class LossBuckets(Evaluation):
    """Mean squared error of x_0, eps and v per bucket of t, on the training batches and on held-out data.

    Training: every batch is added on the device, and reduced over ranks once per row. Held out: each sample at
    fixed noise and fixed times addressed by its id, with the EMA and the raw weights; val/loss and val/loss_raw are
    the means of the training loss there, over uniform t.

    Args:
        data: whose held-out set is used.
        buckets: K >= 1 equal buckets of t.
        every: optimizer steps between rows.
        repeats: times per held-out sample, spread evenly over [0, 1].
    """

    generates = True

    def __init__(self, data: Data, buckets: int = 10, every: int = 500, repeats: int = 4):
        super().__init__(every)
        if buckets < 1:
            raise ValueError(f"buckets={buckets}: need at least 1")
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: need at least 1")
        self.data, self.repeats = data, repeats
        self.train = Buckets(buckets)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        outputs = args[0]
        self.train.add(pl_module.schedule, outputs["t"].flatten(), outputs["parts"]["mse"])
        super().on_train_batch_end(trainer, pl_module, *args)

    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        def reduced(buckets: Buckets) -> Buckets:
            return Buckets.of(trainer.strategy.reduce(buckets.sums, reduce_op="sum"))

        values: dict[str, Any] = reduced(self.train).row("buckets/train")
        place = {"rank": trainer.global_rank, "world": trainer.world_size}
        for name, denoiser in {"val": module.ema.model, "val_raw": module.denoiser}.items():
            held_out, total = held_out_losses(
                denoiser,
                module.schedule,
                self.data.held_out,
                loss=module.loss,
                buckets=self.train.count,
                repeats=self.repeats,
                device=module.device,
                **place,
            )
            total = trainer.strategy.reduce(total, reduce_op="sum")
            values |= reduced(held_out).row(f"buckets/{name}")
            values["val/loss" if name == "val" else "val/loss_raw"] = float(total[0] / total[1])
        self.train = Buckets(self.train.count)
        log(trainer, values)

    def state_dict(self) -> dict[str, Tensor]:
        return {"train": of_all_ranks(self.train.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sums = state_dict["train"]
        self.train = Buckets.of(own_of(sums if sums.ndim == 3 else sums[None]))  # older runs kept rank 0's alone
