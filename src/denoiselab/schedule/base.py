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
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.buffers import ExactBuffers

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


def crossing(rising: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """The least t in [0, 1] beyond which a rising function exceeds each value, by bisection to float64's precision;
    1 where it never does."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = rising(middle) > value
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return high


class Schedule(ExactBuffers):
    """alpha_t and sigma_t as functions of t in [0, 1].

    A subclass writes ``levels(t) -> (alpha_t, sigma_t)`` for any shape of t, with log-SNR strictly decreasing. It may
    write ``inverse`` too, which samplers call at every step, where there is a closed form.
    """

    points: int | None = None
    """T of a discrete-time schedule, whose points are t = (index - 1) / (T - 1), index = 1..T; else None."""

    learns: bool = False
    """Whether training tells it of its losses, by update."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # is where the module is

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
        further (towards a clean level, whose weights would be infinite). Read in every training step, so kept: a
        schedule that learns must not move it."""
        at_zero = float(self.log_snr(torch.zeros((), dtype=torch.float64, device=self.device)))
        if at_zero <= -2 * math.log(LEAST_RATIO):
            return 0.0
        return float(self.inverse(torch.tensor(-2 * math.log(LEAST_RATIO), dtype=torch.float64, device=self.device)))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2) in nats."""
        return log_snr(*self(t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """t with that log-SNR, float64, by bisection to its precision; clipped to [0, 1] beyond the ends."""
        return crossing(lambda t: -self.log_snr(t), -log_snr.double())

    def at(self, log_snr: Tensor) -> Level:
        """The level with that log-SNR."""
        return self(self.inverse(log_snr))

    def rate(self, t: Tensor) -> Tensor:
        """-d log_snr / dt > 0, by automatic differentiation in float64.

        Where sigma_t/alpha_t is beyond [1e-6, 1e6], it is the rate at that bound. So it is finite everywhere, and
        SNR x rate is 0 at pure noise.
        """
        with torch.enable_grad():
            t64 = t.detach().double().clamp(*self._unheld).requires_grad_()
            (slope,) = torch.autograd.grad(self.log_snr(t64).sum(), t64)
        return -slope.to(torch.promote_types(t.dtype, torch.float32))

    @cached_property
    def _unheld(self) -> tuple[float, float]:
        """The first and the last time at which sigma_t/alpha_t is within [1e-6, 1e6]."""
        bound = 2 * math.log(RATIO) - 1e-6
        first, last = self.inverse(torch.tensor([bound, -bound], dtype=torch.float64, device=self.device)).tolist()
        return first, last

    def update(self, t: Tensor, losses: Tensor, mse: Tensor) -> None:
        """Take in the times, the losses and the mean squared x_0 errors of one optimizer step's global batch, (B,)
        each and the same on every rank. Only for schedules that learn; what they keep is in persistent buffers."""

    @property
    def fingerprint(self) -> str:
        """The name and a hash of the log-SNR at 1,001 times, rounded to 1e-6 nats: equal for equal schedules."""
        values = self.log_snr(torch.linspace(0, 1, 1001, dtype=torch.float64, device=self.device))
        rounded = (values * 1e6).round().to(torch.int64).cpu().numpy().astype("<i8")
        return f"{type(self).__name__}:{hashlib.sha256(rounded.tobytes()).hexdigest()[:16]}"

    @property
    def device(self) -> torch.device:
        return self.anchor.device
