"""Pictures of samples during training, from the EMA weights and always the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from denoiselab.callbacks.base import Evaluation, show
from denoiselab.data.base import Data
from denoiselab.guidance import CFG, DenoiserLike
from denoiselab.module import Diffusion
from denoiselab.pictures import captioned, panels, tiles
from denoiselab.rng import Noise
from denoiselab.sampler import Sampler


class SampleGrid(Evaluation):
    """n samples of the EMA weights from fixed noise, with labels 0, 1, 2, ... in turn: one column per class.

    Args:
        data, sampler, guidance, folder: the run's.
        n: the number of samples.
        every: optimizer steps between pictures.
        seed: of the noise.
    """

    def __init__(
        self,
        data: Data,
        sampler: Sampler,
        guidance: Callable[[DenoiserLike], DenoiserLike],
        folder: Path,
        n: int = 100,
        every: int = 500,
        seed: int = 0,
    ):
        super().__init__(every)
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        self.data, self.sampler, self.guidance, self.folder = data, sampler, guidance, folder
        self.n, self.seed = n, seed

    @rank_zero_only
    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        images, label = self.draw(module, self.guidance(module.ema.model), range(self.n))
        if images.ndim == 2:
            picture = panels([images], [f"{self.n} samples, step {trainer.global_step}"], label)
        else:
            picture = tiles(images, self.data.num_classes or round(self.n**0.5))
        show(trainer, self.folder, "sample_grid", picture)

    def draw(self, module: Diffusion, denoiser: DenoiserLike, ids: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Decoded samples with these ids, and their labels, id modulo the number of classes."""
        cond, label = {}, None
        if self.data.num_classes:
            label = torch.tensor(ids) % self.data.num_classes
            cond = {"label": label.to(module.device)}
        noise = Noise(self.seed, ids, self.data.shape, module.device)
        return module.codec.decode(self.sampler(denoiser, module.schedule, noise, **cond)), label


class GuidanceSweep(SampleGrid):
    """The same noise and labels down the columns, one row per guidance scale.

    Args:
        data, sampler, folder: the run's.
        scales: guidance scales, one row each.
        n: samples per row.
        every: optimizer steps between pictures.
        seed: of the noise.
    """

    def __init__(
        self,
        data: Data,
        sampler: Sampler,
        folder: Path,
        scales: Sequence[float] = (1, 1.5, 2, 3, 5, 7),
        n: int = 10,
        every: int = 2000,
        seed: int = 0,
    ):
        super().__init__(data, sampler, lambda denoiser: denoiser, folder, n, every, seed)
        self.scales = [float(scale) for scale in scales]

    @rank_zero_only
    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        if not self.data.num_classes:
            return
        ids = range(self.n)
        drawn = [self.draw(module, CFG(module.ema.model, scale), ids) for scale in self.scales]
        captions = [f"scale {scale:g}" for scale in self.scales]
        if drawn[0][0].ndim == 2:
            picture = panels([images for images, _ in drawn], captions, drawn[0][1])
        else:
            header = f"same noise and label down each column; step {trainer.global_step}"
            picture = captioned([tiles(images, self.n) for images, _ in drawn], captions, header)
        show(trainer, self.folder, "guidance_sweep", picture)
