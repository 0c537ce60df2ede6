"""Circles in the plane, with Gaussian noise on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.data.points.base import Known
from denoiselab.models.layers import require
from denoiselab.rng import generator


class Concentric(Known):
    """Circles about the origin, as likely, with N(0, std^2 I) on them; the label is the circle, in the order of radii.

    At r = |y|, with R = alpha radius and v = alpha^2 std^2 + sigma^2, a circle's density is Rice's law of r
    (Rice 1945, doi:10.1002/j.1538-7305.1945.tb00453.x) over 2 pi r::

        p_k(y) = exp(-(r^2 + R^2)/(2 v)) I_0(r R/v)/(2 pi v)
        grad log p_k(y) = (R I_1(r R/v)/I_0(r R/v) - r)/v  y/r
    """

    name: str
    radii: Tensor
    std: float

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh points (n, 2) and their rings (n,)."""
        g = generator(seed, self.name)
        label = torch.randint(0, len(self.radii), (n,), generator=g)
        angle = 2 * math.pi * torch.rand(n, generator=g)
        circle = self.radii[label, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        return circle + self.std * torch.randn(n, 2, generator=g), label

    def components(self, points: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        radius = alpha * self.radii.to(points)  # (N, K)
        v = (alpha * self.std) ** 2 + sigma**2  # (N, 1)
        r = points.norm(dim=1, keepdim=True)
        z = r * radius / v
        scaled = torch.special.i0e(z)  # I_0(z) e^-z
        log_p = scaled.log() - (r - radius) ** 2 / (2 * v) - (2 * math.pi * v * len(self.radii)).log()
        outward = (points / r.clamp_min(torch.finfo(r.dtype).tiny))[:, None]  # (N, 1, 2)
        return log_p, ((radius * torch.special.i1e(z) / scaled - r) / v)[..., None] * outward


class Rings(Concentric):
    """Four circles of radii 3/4, 3/2, 9/4 and 3, and N(0, noise^2 I); the label is the circle, 0 the innermost.

    As many points are on each, so the inner ones are denser. FFJORD adds this noise to circles that are scaled already,
    so 0.08 is in the units of the points, unlike that of its two ``Circles``.

    Args:
        batch_size, workers, n: as for ``Points``.
        noise: the standard deviation of a point about its circle, > 0.
    """

    num_classes = 4
    name, radii = "rings", torch.tensor([0.75, 1.5, 2.25, 3.0])

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000, noise: float = 0.08):
        require("noise", noise, 0 < noise < math.inf, "a number > 0")
        self.std = noise
        super().__init__(batch_size, workers, n)


class Circles(Concentric):
    """Two circles of radii 3 factor and 3, and N(0, (3 noise)^2 I); the label is 0 on the inner, 1 on the outer one.

    FFJORD takes scikit-learn's circles, of radii factor and 1, and scales them with their noise by 3.

    Args:
        batch_size, workers, n: as for ``Points``.
        factor: the inner radius in units of the outer, in (0, 1).
        noise: the standard deviation of a point about its circle in units of the outer radius, > 0.
    """

    num_classes = 2
    name = "circles"

    def __init__(
        self, batch_size: int = 512, workers: int = 0, n: int = 50_000, factor: float = 0.5, noise: float = 0.08
    ):
        require("factor", factor, 0 < factor < 1, "a number in (0, 1)")
        require("noise", noise, 0 < noise < math.inf, "a number > 0")
        self.radii, self.std = torch.tensor([3 * factor, 3.0]), 3 * noise
        super().__init__(batch_size, workers, n)
