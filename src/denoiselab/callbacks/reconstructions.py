"""What an autoencoder makes of held-out images, during training."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from denoiselab.callbacks.base import Evaluation, log, show
from denoiselab.data.base import Data
from denoiselab.denoiser import Reconstructor, reconstructed
from denoiselab.metrics.pairs import fidelity
from denoiselab.module import Diffusion
from denoiselab.pictures import pairs


class Reconstructions(Evaluation):
    """A picture of held-out images over the EMA weights' reconstructions of them; and val/psnr, val/ssim and
    val/mse of up to 512 held-out images, as ``metrics.Fidelity`` measures them.

    Args:
        data, folder: the run's.
        n: images in the picture.
        every: optimizer steps between pictures.
    """

    generates = False
    alone = True

    MEASURED = 512

    def __init__(self, data: Data, folder: Path, n: int = 10, every: int = 500):
        super().__init__(every)
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        self.data, self.folder, self.n = data, folder, n

    @rank_zero_only
    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        assert isinstance(module.ema.model, Reconstructor)
        images = self.data.held_out.draw(self.MEASURED)["x_0"]
        found = reconstructed(module.ema.model, images, module.device)
        given, made = (module.codec.decode(part) for part in (images, found))
        values = fidelity(made, given)
        log(trainer, {f"val/{name}": value for name, value in values.items()})
        header = f"held-out images, step {trainer.global_step}: {values['psnr']:.1f} dB"
        show(trainer, self.folder, "reconstructions", pairs(given[: self.n], made[: self.n], header))
