"""What an autoencoder makes of held-out images, during training."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from denoiselab.callbacks.base import Evaluation, log, show
from denoiselab.data.base import Data
from denoiselab.denoiser import Reconstructor, reconstructed
from denoiselab.module import Diffusion
from denoiselab.pictures import captioned, tiles


class Reconstructions(Evaluation):
    """A picture of held-out images over the EMA weights' reconstructions of them; and val/mse and val/psnr, the mean
    squared error and 10 log10(4/mse) dB over up to 512 held-out images in [-1, 1].

    Args:
        data, folder: the run's.
        n: images in the picture.
        every: optimizer steps between pictures.
    """

    generates = False

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
        mse = (found - images).double().square().mean()
        log(trainer, {"val/mse": mse.item(), "val/psnr": (10 * (4 / mse).log10()).item()})
        rows = [tiles(module.codec.decode(part[: self.n]), self.n) for part in (images, found)]
        header = f"held-out images, step {trainer.global_step}: {10 * (4 / mse).log10():.1f} dB"
        show(trainer, self.folder, "reconstructions", captioned(rows, ["given", "made"], header))
