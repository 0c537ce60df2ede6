"""Two-dimensional point sets with exact densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Standardise
from denoiselab.rng import generator


class EightGaussians(Data):
    """Eight Gaussians on a circle: radius 4/1.414, standard deviation 0.5/1.414; the label is the mode (Grathwohl
    et al. 2019, arXiv:1810.01367, FFJORD's toy data).

    Args:
        batch_size: the global batch.
        workers: loader processes.
        n: training points, >= 8; a fifth as many again are held out.
    """

    num_classes = 8
    shape = (2,)
    radius = 4 / 1.414
    std = 0.5 / 1.414

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000):
        super().__init__(batch_size, workers)
        if n < 8:
            raise ValueError(f"n={n}: need at least 8 points")
        points, label = self.draw(n + n // 5)
        self.codec = Standardise.of(points[:n])
        x_0 = self.codec.encode(points)
        ids = torch.arange(len(points))
        self.train = Samples(x_0[:n], label[:n], ids[:n])
        self.held_out = Samples(x_0[n:], label[n:], ids[n:])

    @property
    def centres(self) -> Tensor:
        """The modes' means, (8, 2), label k at angle k pi/4."""
        angle = torch.arange(8) * math.pi / 4
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh points (n, 2) and their modes (n,)."""
        g = generator(seed, "8gaussians")
        label = torch.randint(0, 8, (n,), generator=g)
        return self.centres[label] + self.std * torch.randn(n, 2, generator=g), label

    def log_density(self, points: Tensor) -> Tensor:
        """log p(point), exact, in nats; points (..., 2)."""
        squared = (points[..., None, :] - self.centres.to(points)).square().sum(-1)  # (..., 8)
        log_normal = -squared / (2 * self.std**2) - math.log(2 * math.pi * self.std**2)
        return log_normal.logsumexp(-1) - math.log(8)
