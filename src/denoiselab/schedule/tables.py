"""Discrete-time schedules: tables of T betas, made continuous."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.schedule.base import Schedule


class Discrete(Schedule):
    """A table of T betas (discrete-time diffusion) made continuous: log-SNR interpolated linearly in the index.

    abar_t = prod_{s<=t} (1 - beta_s), alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) (Ho et al. 2020,
    arXiv:2006.11239, eq. 4), exact at its T points: t = 0 is index 1 and t = 1 is index T. The table is kept in
    float64, since float32's cumulative product is off by 1e-5.
    """

    log_snr_table: Tensor

    def __init__(self, betas: Tensor):
        super().__init__()
        betas = betas.double()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be at least two numbers in (0, 1)")
        log_abar = torch.log1p(-betas).cumsum(0)
        self.points = len(betas)
        self.register_buffer("log_snr_table", log_abar - torch.log(-torch.expm1(log_abar)), persistent=False)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position, index = self._locate(t)
        left, right = self.log_snr_table[index], self.log_snr_table[index + 1]
        value = left + (position - index) * (right - left)
        return value.sigmoid().sqrt(), (-value).sigmoid().sqrt()

    def rate(self, t: Tensor) -> Tensor:
        """The slope of the table's segment that t lies in."""
        _, index = self._locate(t.double())
        slope = (self.log_snr_table[index] - self.log_snr_table[index + 1]) * (len(self.log_snr_table) - 1)
        return slope.to(torch.promote_types(t.dtype, torch.float32))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The place in the table's segment that the log-SNR lies in."""
        value, table = log_snr.double().contiguous(), self.log_snr_table
        index = (torch.searchsorted(-table, -value) - 1).clamp(0, len(table) - 2)
        left, right = table[index], table[index + 1]
        return ((index + (value - left) / (right - left)) / (len(table) - 1)).clamp(0, 1)

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        last = len(self.log_snr_table) - 1
        position = t * last
        return position, position.floor().long().clamp(0, last - 1)


class Linear(Discrete):
    """beta_t from 1e-4 to 0.02, scaled by 1000/T (Ho et al. 2020, arXiv:2006.11239, section 4).

    Args:
        points: T, at least 21 (fewer would bring beta_T above 1).
        beta_min: beta_1 at T = 1000, in (0, 1).
        beta_max: beta_T at T = 1000, in (beta_min, 1).

    >>> alpha_t, sigma_t = Linear()(torch.tensor([0.0, 1.0]).double())
    >>> print(f"{sigma_t[0]**2:.4g} {alpha_t[1]**2:.4g}")          # beta_1 and abar_T
    0.0001 4.036e-05
    """

    def __init__(self, points: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02):
        first, last = per_step(points, beta_min, beta_max)
        super().__init__(torch.linspace(first, last, points, dtype=torch.float64))


class ScaledLinear(Discrete):
    """sqrt(beta_t) from sqrt(8.5e-4) to sqrt(0.012), even in t (Stable Diffusion; Rombach et al. 2022,
    arXiv:2112.10752, whose code calls it linear). Its last level keeps alpha_T = 0.068 of the data.

    beta_t is scaled by 1000/T as in Linear: -log abar_t is nearly the integral of beta, which then is T's whatever T.

    Args:
        points: T, at least 13 (fewer would bring beta_T above 1).
        beta_min: beta_1 at T = 1000, in (0, 1).
        beta_max: beta_T at T = 1000, in (beta_min, 1).

    >>> ScaledLinear()(torch.tensor(1.0).double()).alpha
    tensor(0.0683, dtype=torch.float64)
    """

    def __init__(self, points: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012):
        first, last = per_step(points, beta_min, beta_max)
        super().__init__(torch.linspace(first**0.5, last**0.5, points, dtype=torch.float64) ** 2)


class SigmoidBeta(Discrete):
    """beta_t = beta_min + (beta_max - beta_min) sigmoid(u), u from -6 to 6, even in t (the code of GeoDiff, Xu et al.
    2022, arXiv:2203.02923, and of DDIM, arXiv:2010.02502). Sigmoid is another schedule.

    beta_t is scaled by 1000/T as in Linear.

    Args:
        points: T, at least 21 (fewer would bring beta_T near 1).
        beta_min: the lower end of the sigmoid at T = 1000, in (0, 1); beta_1 is 0.25% of the way up.
        beta_max: the upper end at T = 1000, in (beta_min, 1).
    """

    def __init__(self, points: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02):
        first, last = per_step(points, beta_min, beta_max)
        rise = torch.linspace(-6, 6, points, dtype=torch.float64).sigmoid()
        super().__init__(first + (last - first) * rise)


class Sigmoid(Discrete):
    """abar_t = (g(1) - g(t/T)) / (g(1) - g(0)), g(u) = sigmoid((start + (end - start) u) / tau), beta_t <= beta_max
    (Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972, section 2.1). SigmoidBeta is another schedule.

    Args:
        points: T, at least 2.
        start: where on the sigmoid data lies.
        end: where noise lies, > start.
        tau: temperature, > 0; smaller is steeper in the middle.
        beta_max: the clip, in (0, 1); at 0.999 it moves index T only.
    """

    def __init__(
        self, points: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, beta_max: float = 0.999
    ):
        if not start < end:
            raise ValueError(f"start={start}, end={end}: need start < end, such as -3 and 3")
        if not tau > 0:
            raise ValueError(f"tau={tau}: need a number > 0, such as 1")
        u = torch.linspace(start, end, at_least_two(points) + 1, dtype=torch.float64)
        g = (u / tau).sigmoid()
        super().__init__((g.diff() / (g[-1] - g[:-1])).clamp_max(a_clip(beta_max)))


class Cosine(Discrete):
    """abar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta_t <= 0.999 (Nichol and Dhariwal 2021,
    arXiv:2102.09672, eq. 17).

    Args:
        points: T, at least 2.
        shift: s > 0, which keeps beta_1 from vanishing.
        beta_max: the clip, in (0, 1); at 0.999 it moves index T only.

    >>> alpha_t, sigma_t = Cosine()(torch.tensor([0.0, 499 / 999, 1.0]).double())
    >>> print(f"{sigma_t[0]**2:.4g} {alpha_t[1]**2:.4f} {alpha_t[2]**2:.4g}")   # beta_1, abar_500, abar_T
    4.128e-05 0.4938 2.429e-09
    """

    def __init__(self, points: int = 1000, shift: float = 0.008, beta_max: float = 0.999):
        if not shift > 0:
            raise ValueError(f"shift={shift}: need a number > 0, such as 0.008")
        u = torch.arange(at_least_two(points) + 1, dtype=torch.float64) / points
        f = torch.cos((u + shift) / (1 + shift) * math.pi / 2) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp_max(a_clip(beta_max)))


def at_least_two(points: int) -> int:
    if points < 2:
        raise ValueError(f"points={points}: need at least 2 (the published tables have 1000)")
    return points


def a_clip(beta_max: float) -> float:
    if not 0 < beta_max < 1:
        raise ValueError(f"beta_max={beta_max}: need a number in (0, 1), such as 0.999")
    return beta_max


def per_step(points: int, beta_min: float, beta_max: float) -> tuple[float, float]:
    """The range of beta_t at T = 1000 as that of T points: scaled by 1000/T, which keeps the whole amount of noise."""
    scale = 1000 / at_least_two(points)
    if 0 < beta_min < beta_max < 1 <= beta_max * scale:
        raise ValueError(f"points={points}: need at least {math.floor(1000 * beta_max) + 1}, or beta_T reaches 1")
    if not 0 < beta_min < beta_max or not beta_max * scale < 1:
        raise ValueError(
            f"beta_min={beta_min}, beta_max={beta_max}: need 0 < beta_min < beta_max < points/1000 = {1 / scale:g}"
        )
    return beta_min * scale, beta_max * scale
