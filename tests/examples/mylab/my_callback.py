"""A callback of one's own."""

import lightning.pytorch as pl
import torch

from denoiselab.callbacks.base import Periodic, log
from denoiselab.module import Diffusion


class EMADistance(Periodic):
    """ema/distance: |w_ema - w| / |w| over all weights of the denoiser, every ``every`` optimizer steps."""

    @torch.no_grad()
    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        averaged, live = (
            torch.cat([p.flatten().float() for p in model.parameters()])
            for model in (module.ema.model, module.denoiser)
        )
        log(trainer, {"ema/distance": float((averaged - live).norm() / live.norm())})
