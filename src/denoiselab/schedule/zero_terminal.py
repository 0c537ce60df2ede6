"""Another schedule, made to end in pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.schedule.base import Schedule


class ZeroTerminal(Schedule):
    """a_t = (a_t - a_1) a_0 / (a_0 - a_1) for a_t = sqrt(abar_t) of another schedule: alpha_1 = 0, and the first level
    is kept (Lin et al. 2023, arXiv:2305.08891, algorithm 1).

    A schedule that keeps some data at t = 1 trains on a last level that pure noise, where samplers start, is not.
    The result is variance preserving whatever the other one is: abar_t = SNR/(SNR + 1).

    Args:
        schedule: the other one.

    >>> from denoiselab.schedule import ScaledLinear
    >>> ZeroTerminal(ScaledLinear())(torch.tensor([0.0, 1.0]).double()).alpha
    tensor([0.9996, 0.0000], dtype=torch.float64)
    """

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule, self.points = schedule, schedule.points
        a, missing = self._circle(torch.tensor([0.0, 1.0], dtype=torch.float64, device=schedule.device))
        (self.first, self.last), self.missing = a.tolist(), missing[0].item()

    def _circle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) of the other schedule, and 1 - sqrt(abar_t) without cancellation."""
        alpha_t, sigma_t = self.schedule.levels(t)
        whole = torch.hypot(alpha_t, sigma_t)
        a = alpha_t / whole
        return a, (sigma_t / whole) ** 2 / (1 + a)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, missing = self._circle(t)
        alpha_t = ((a - self.last) * (self.first / (self.first - self.last))).clamp_min(0)
        missing = (self.first * missing - self.last * self.missing) / (self.first - self.last)  # 1 - alpha_t
        return alpha_t, (missing * (1 + alpha_t)).sqrt()

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The other schedule's inverse, of the log-SNR that it had."""
        alpha_t, variance = log_snr.double().sigmoid().sqrt(), (-log_snr.double()).sigmoid()
        a = alpha_t * (self.first - self.last) / self.first + self.last
        missing = (variance / (1 + alpha_t) * (self.first - self.last) + self.last * self.missing) / self.first
        return self.schedule.inverse(2 * a.log() - (missing * (1 + a)).log())
