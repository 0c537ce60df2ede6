"""Densities that are sums over centres, and the simplest of them: a chessboard."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from denoiselab.data.points.base import Known
from denoiselab.rng import generator

NARROWEST = 1e-5
"""The half-width, in units of sigma, below which a noised interval is a point to 11 digits."""


class Spread(Known):
    """p(y) = sum_k w_k q(y_1 - c_k1) q(y_2 - c_k2), q of a value uniform on [-half, half] plus N(0, std^2); a subclass
    writes ``centres`` and ``draw``.

    Noised, the centres are alpha c_k, the squares alpha times as wide, and the variance alpha^2 std^2 + sigma^2.
    """

    half: float = 0.0
    std: float = 0.0

    @cached_property
    def centres(self) -> tuple[Tensor, Tensor]:
        """c_k, (K, 2), and w_k, (K,), float64."""
        raise NotImplementedError

    def components(self, points: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        centres, weights = (part.to(points) for part in self.centres)
        away = points[:, None] - alpha[..., None] * centres  # (N, K, 2)
        sigma = torch.hypot(alpha * self.std, sigma)[..., None]  # (N, 1, 1)
        log_q, gradient = box(away, alpha[..., None] * self.half, sigma) if self.half else normal(away, sigma)
        return log_q.sum(-1) + weights.log(), gradient


def normal(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """log N(x; 0, sigma^2) and its derivative by x."""
    return -(x**2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2, -x / sigma**2


def box(x: Tensor, half: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """log((Phi((x + half)/sigma) - Phi((x - half)/sigma))/(2 half)) and its derivative by x: a value uniform on
    [-half, half), plus N(0, sigma^2).

    Without noise it is -log(2 half) and 0 inside, and -infinity and 0 outside.
    """
    noisy, inside = sigma > 0, (-half <= x) & (x < half)
    s = torch.where(noisy, sigma, 1.0)
    wide = torch.maximum(half, NARROWEST * s)
    # Phi(b) - Phi(a) with a < 0, |b| < |a|: on the left over e^(-b^2/2), where it would be 0; else what is added has
    # one sign.
    a, b = (-wide - x.abs()) / s, (wide - x.abs()) / s
    tail, left = b < 0, b.clamp_max(0)
    drop = (left - a) * (left + a) / 2  # log of e^(-a^2/2) over e^(-left^2/2)
    erfcx, erf, root = torch.special.erfcx, torch.special.erf, math.sqrt(0.5)
    mass = torch.where(tail, erfcx(-root * left) - drop.exp() * erfcx(-root * a), erf(root * b) - erf(root * a)) / 2
    fall = torch.where(tail, drop.expm1(), (-(a**2) / 2).exp() - (-(b**2) / 2).exp()) / math.sqrt(2 * math.pi)
    log_q = mass.log() - left**2 / 2 - (2 * wide).log()
    sharp = torch.where(inside, -(2 * half).log(), -math.inf)
    return torch.where(noisy, log_q, sharp), torch.where(noisy, x.sign() * fall / (mass * s), 0.0)


class Checkerboard(Spread):
    """The eight squares of side 2 of a chessboard of side 8 about the origin, evenly filled; the label is the square,
    numbered column by column from the left, upwards. The density is 1/32 on them.

    Its score is 0 inside; outside, where the density is 0, it is NaN. Both ask for noise to say more.

    Args:
        batch_size, workers, n: as for ``Points``.
    """

    num_classes = 8
    half = 1.0

    @cached_property
    def centres(self) -> tuple[Tensor, Tensor]:
        columns, rows = [-3, -3, -1, -1, 1, 1, 3, 3], [-3, 1, -1, 3, -3, 1, -1, 3]
        c = torch.tensor([columns, rows], dtype=torch.float64).T
        return c, torch.full((8,), 1 / 8, dtype=torch.float64)

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh points (n, 2) and their squares (n,)."""
        g = generator(seed, "checkerboard")
        label = torch.randint(0, 8, (n,), generator=g)
        return self.centres[0].float()[label] + 2 * torch.rand(n, 2, generator=g) - 1, label
