"""Noise schedules: alpha_t and sigma_t of ``x_t = alpha_t x_0 + sigma_t eps`` for t in [0, 1].

t = 0 is data, t = 1 is noise, and ``log_snr = log(alpha_t^2 / sigma_t^2)`` falls strictly with t. A schedule is
its one method ``levels(t)``; everything else follows from it. To add one::

    class Power(Schedule):
        def levels(self, t):
            alpha_t = 1 - t**3
            return alpha_t, (1 - alpha_t**2).sqrt()
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

RATIO = 1e6
"""sigma/alpha is held in [1/RATIO, RATIO] wherever its logarithm is taken, so that the clean level and pure
noise have finite log-SNRs (+-27.6)."""

LEAST_RATIO = 1e-4
"""sigma/alpha below which no level is trained at or sampled from."""


class Level(NamedTuple):
    """A noise level (alpha, sigma); shapes broadcast against x."""

    alpha: Tensor
    sigma: Tensor

    @property
    def log_snr(self) -> Tensor:
        return log_snr(self.alpha, self.sigma)

    def like(self, x: Tensor) -> Level:
        """The level once per sample: shape (B, 1, ...), dtype and device of x."""
        shape = (len(x),) + (1,) * (x.ndim - 1)
        return Level(*(v.to(x.device, x.dtype).reshape(-1, *shape[1:]).expand(shape) for v in (self.alpha, self.sigma)))


def log_snr(alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """log(alpha_t^2 / sigma_t^2), with the ratio held in [1e-6, 1e6]."""
    return 2 * (alpha_t.clamp_min(sigma_t / RATIO) / sigma_t.clamp_min(alpha_t / RATIO)).log()


class Schedule(nn.Module):
    """alpha_t and sigma_t as functions of t in [0, 1].

    A subclass writes ``levels(t) -> (alpha_t, sigma_t)`` for any shape of t, with log-SNR strictly decreasing.
    """

    points: int | None = None
    """T of a discrete-time schedule, whose points are t = (index - 1) / (T - 1), index = 1..T; else None."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, t: Tensor) -> Level:
        """The level at t, computed in float64 and returned in t's dtype (float32 at least).

        bfloat16 times would move the log-SNR by nats, hence the widening.
        """
        dtype = torch.promote_types(t.dtype, torch.float32)
        alpha_t, sigma_t = self.levels(t.double())
        return Level(alpha_t.to(dtype), sigma_t.to(dtype))

    @cached_property
    def earliest(self) -> float:
        """The smallest time to train at or sample from: 0, or where sigma_t/alpha_t = 1e-4 if the schedule goes
        further (towards a clean level, whose weights would be infinite)."""
        at_zero = float(self.log_snr(torch.zeros((), dtype=torch.float64, device=self.device)))
        if at_zero <= -2 * math.log(LEAST_RATIO):
            return 0.0
        return float(self.inverse(torch.tensor(-2 * math.log(LEAST_RATIO), dtype=torch.float64, device=self.device)))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2) in nats."""
        return log_snr(*self(t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """t with that log-SNR, by bisection to float64's precision; clipped to [0, 1] beyond the ends."""
        target = log_snr.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < target
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return high

    def at(self, log_snr: Tensor) -> Level:
        """The level with that log-SNR."""
        return self(self.inverse(log_snr))

    def rate(self, t: Tensor) -> Tensor:
        """-d log_snr / dt > 0, by automatic differentiation in float64."""
        with torch.enable_grad():
            t64 = t.detach().double().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_snr(t64).sum(), t64)
        return -slope.to(torch.promote_types(t.dtype, torch.float32))

    @property
    def fingerprint(self) -> str:
        """The name and a hash of the log-SNR at 1,001 times, rounded to 1e-6 nats: equal for equal schedules."""
        values = self.log_snr(torch.linspace(0, 1, 1001, dtype=torch.float64, device=self.device))
        rounded = (values * 1e6).round().to(torch.int64).cpu().numpy().astype("<i8")
        return f"{type(self).__name__}:{hashlib.sha256(rounded.tobytes()).hexdigest()[:16]}"

    @property
    def device(self) -> torch.device:
        return next((buffer.device for buffer in self.buffers()), torch.device("cpu"))

    def _apply(self, fn, recurse=True):
        """Follow the module's device, never its dtype: tables stay float64 under bf16-true."""
        device = fn(torch.zeros(())).device
        return super()._apply(lambda buffer: buffer.to(device), recurse)


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
        scale = 1000 / _points(points)
        if 0 < beta_min < beta_max < 1 <= beta_max * scale:
            raise ValueError(f"points={points}: need at least {math.floor(1000 * beta_max) + 1}, or beta_T reaches 1")
        if not 0 < beta_min < beta_max or not beta_max * scale < 1:
            raise ValueError(
                f"beta_min={beta_min}, beta_max={beta_max}: need 0 < beta_min < beta_max < points/1000 = {1 / scale:g}"
            )
        super().__init__(torch.linspace(beta_min * scale, beta_max * scale, points, dtype=torch.float64))


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
        if not 0 < beta_max < 1:
            raise ValueError(f"beta_max={beta_max}: need a number in (0, 1), such as 0.999")
        u = torch.arange(_points(points) + 1, dtype=torch.float64) / points
        f = torch.cos((u + shift) / (1 + shift) * math.pi / 2) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp_max(beta_max))


def _points(points: int) -> int:
    if points < 2:
        raise ValueError(f"points={points}: need at least 2 (the published tables have 1000)")
    return points
