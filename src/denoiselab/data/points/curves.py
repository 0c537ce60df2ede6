"""Curves in the plane, with noise on them."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from denoiselab.data.points.spread import Spread
from denoiselab.models.layers import require
from denoiselab.rng import generator

NODES, PART = 64, 20.0
"""So many nodes of a quadrature stand for so much of a curve, in standard deviations of the noise on it."""


class Curves(Spread):
    """y = c_k(u) + noise, k one of the curves, which are as likely, and u on [0, end]; a subclass writes ``curve``, and
    where u is not uniform ``along`` and ``share``.

    The density is an integral over u for which no closed form is known (that of an arc is an incomplete Bessel
    function). Its integrand is analytic and as wide as the noise; over the nodes of a quadrature that stand closer than
    that, its sum is the integral to 12 digits wherever the density is above e^-100, the more so with noise added. So
    the centres are c_k at these nodes.
    """

    name: str
    end: float
    speed: float
    """The largest |dc/du|."""

    def curve(self, u: Tensor, k: Tensor) -> Tensor:
        """c_k(u), (..., 2)."""
        raise NotImplementedError

    def along(self, v: Tensor) -> Tensor:
        """u of v uniform on [0, 1]."""
        return self.end * v

    def share(self, u: Tensor) -> Tensor:
        """The density of u."""
        return torch.full_like(u, 1 / self.end)

    @cached_property
    def centres(self) -> tuple[Tensor, Tensor]:
        u, w = quadrature(self.end, PART * self.std / self.speed)
        curves = max(1, self.num_classes)
        c = self.curve(u.expand(curves, -1), torch.arange(curves)[:, None])  # (curves, nodes, 2)
        return c.flatten(0, 1), (w * self.share(u) / curves).repeat(curves)

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """n fresh points (n, 2) and their curves (n,), or None where there is but one."""
        g = generator(seed, self.name)
        k = torch.randint(0, max(1, self.num_classes), (n,), generator=g)
        c = self.curve(self.along(torch.rand(n, generator=g)), k)
        square = self.half * (2 * torch.rand(n, 2, generator=g) - 1)
        return c + square + self.std * torch.randn(n, 2, generator=g), k if self.num_classes else None


def quadrature(end: float, step: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre's rule of 64 points on equal parts of [0, end], at most a step wide."""
    parts = math.ceil(end / step)
    u, w = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(NODES))  # on [-1, 1]
    middle = torch.arange(parts, dtype=torch.float64) + 0.5
    return ((middle[:, None] + u / 2) * end / parts).flatten(), (w / 2 * end / parts).repeat(parts)


class Moons(Curves):
    """Two interleaving half circles of radius 2, and N(0, (2 noise)^2 I); the label is 0 on the upper, 1 on the lower.

    (-1, -0.2) + 2 (cos u, sin u) and (1, 0.8) - 2 (cos u, sin u), u uniform on [0, pi]. FFJORD takes scikit-learn's
    moons, of radius 1, and scales them with their noise by 2. The density is a quadrature (``Curves``).

    Args:
        batch_size, workers, n: as for ``Points``.
        noise: the standard deviation of a point about its moon in units of the radius, >= 0.01.
    """

    num_classes = 2
    name, end, speed = "moons", math.pi, 2.0

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000, noise: float = 0.1):
        require("noise", noise, 0.01 <= noise < math.inf, "a number >= 0.01")
        self.std = 2 * noise
        super().__init__(batch_size, workers, n)

    def curve(self, u: Tensor, k: Tensor) -> Tensor:
        middle = torch.tensor([[-1.0, -0.2], [1.0, 0.8]], dtype=torch.float64)[k].to(u.dtype)
        return middle + 2 * (1 - 2 * k[..., None]) * torch.stack([u.cos(), u.sin()], dim=-1)


class SwissRoll(Curves):
    """t/5 (cos t, sin t), t uniform on [3 pi/2, 9 pi/2], and N(0, (noise/5)^2 I); without labels.

    FFJORD takes the first and the last coordinate of scikit-learn's Swiss roll and scales them with their noise by 1/5.
    The density is a quadrature (``Curves``).

    Args:
        batch_size, workers, n: as for ``Points``.
        noise: 5 times the standard deviation of a point about the roll, >= 0.1.
    """

    name, end, speed = "swissroll", 3 * math.pi, math.hypot(1, 4.5 * math.pi) / 5

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000, noise: float = 1.0):
        require("noise", noise, 0.1 <= noise < math.inf, "a number >= 0.1")
        self.std = noise / 5
        super().__init__(batch_size, workers, n)

    def curve(self, u: Tensor, k: Tensor) -> Tensor:
        t = 1.5 * math.pi + u
        return t[..., None] / 5 * torch.stack([t.cos(), t.sin()], dim=-1)


class TwoSpirals(Curves):
    """+-((-u cos u, u sin u) + s)/3 and N(0, noise^2 I), u = 3 pi sqrt(v), v uniform on [0, 1] and s on [0, 1/2]^2; the
    label is 0 for +, 1 for -.

    FFJORD's spirals are so smeared by a square whose corner, not its middle, is at the origin. The density is a
    quadrature (``Curves``).

    Args:
        batch_size, workers, n: as for ``Points``.
        noise: the standard deviation of the Gaussian part of the noise, >= 0.02.
    """

    num_classes = 2
    name, end, speed = "2spirals", 3 * math.pi, math.hypot(1, 3 * math.pi) / 3
    half = 0.25 / 3

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000, noise: float = 0.1):
        require("noise", noise, 0.02 <= noise < math.inf, "a number >= 0.02")
        self.std = noise
        super().__init__(batch_size, workers, n)

    def along(self, v: Tensor) -> Tensor:
        return self.end * v.sqrt()

    def share(self, u: Tensor) -> Tensor:
        return 2 * u / self.end**2

    def curve(self, u: Tensor, k: Tensor) -> Tensor:
        middle = torch.stack([-u * u.cos(), u * u.sin()], dim=-1) + 0.25
        return (1 - 2 * k[..., None]) * middle / 3
