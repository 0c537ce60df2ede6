"""Pictures of samples during training, from the EMA weights and always the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from denoiselab.callbacks.base import Evaluation, show
from denoiselab.data.base import Batch, Data
from denoiselab.guidance import DenoiserLike
from denoiselab.module import Diffusion
from denoiselab.pictures import enlargements, panels, tiles
from denoiselab.rng import Noise
from denoiselab.sampler import Sampler


class SampleGrid(Evaluation):
    """n samples of the EMA weights from fixed noise, with labels 0, 1, 2, ... in turn: one column per class. Where the
    data are told more than a class, samples are made of the first n held-out ones; enlarged images are shown under the
    small ones and over the real ones.

    Args:
        data, sampler, guidance, folder: the run's.
        n: the number of samples.
        every: optimizer steps between pictures.
        seed: of the noise.
    """

    generates = True
    alone = True

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

    @cached_property
    def held_out(self) -> Batch | None:
        """What samples are made of, if of anything but noise and a class."""
        return self.data.held_out.draw(self.n) if self.data.low_res or self.data.vector else None

    @property
    def ids(self) -> range:
        return range(self.n if self.held_out is None else len(self.held_out["id"]))

    @rank_zero_only
    def run(self, trainer: pl.Trainer, module: Diffusion) -> None:
        images, cond = self.draw(module, self.guidance(module.ema.model), self.ids)
        if images.ndim == 2:
            picture = panels([images], [f"{len(images)} samples, step {trainer.global_step}"], cond.get("label"))
        elif self.held_out is not None and "low_res" in cond:
            real = module.codec.decode(self.held_out["x_0"].to(module.device))
            picture = enlargements(cond["low_res"], images, real)
        else:
            in_turn = self.data.num_classes if self.held_out is None else 0
            picture = tiles(images, in_turn or round(len(images) ** 0.5))
        show(trainer, self.folder, "sample_grid", picture)

    def draw(self, module: Diffusion, denoiser: DenoiserLike, ids: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoded samples with these ids, and what they were asked for; the label is the id modulo the number of
        classes where it is all there is."""
        if self.held_out is not None:
            cond = {name: value[list(ids)] for name, value in self.held_out["cond"].items()}
        else:
            classes = self.data.num_classes
            cond = {"label": torch.tensor(ids) % classes} if classes else {}
        cond = {name: value.to(module.device) for name, value in cond.items()}
        noise = Noise(self.seed, ids, self.data.shape, module.device)
        return module.codec.decode(self.sampler(denoiser, module.schedule, noise, **cond)), cond
