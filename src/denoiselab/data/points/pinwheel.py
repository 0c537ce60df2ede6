"""A pinwheel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.data.points.base import Points
from denoiselab.models.layers import require
from denoiselab.rng import generator


class Pinwheel(Points):
    """2 (a, b) turned clockwise by 2 pi k/arms + e^a/4, where a ~ N(1, 0.3^2) and b ~ N(0, 0.1^2); the label is the
    arm k (Johnson et al. 2016, arXiv:1603.06277, whose picture it is, by way of FFJORD).

    No density is given: how far a point is turned depends on how far along its arm it was, and where it came from
    solves a transcendental equation.

    Args:
        batch_size, workers, n: as for ``Points``.
        arms: >= 1.
    """

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000, arms: int = 5):
        require("arms", arms, arms >= 1, "at least 1")
        self.num_classes = arms
        super().__init__(batch_size, workers, n)

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh points (n, 2) and their arms (n,)."""
        g = generator(seed, "pinwheel")
        label = torch.randint(0, self.num_classes, (n,), generator=g)
        a, b = (torch.randn(n, 2, generator=g) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])).unbind(1)
        angle = 2 * math.pi * label / self.num_classes + a.exp() / 4
        cos, sin = angle.cos(), angle.sin()
        return 2 * torch.stack([a * cos + b * sin, b * cos - a * sin], dim=1), label
