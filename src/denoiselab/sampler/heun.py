"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from denoiselab.sampler.base import Denoise, Sampler
from denoiselab.schedule import Level, Schedule


class Heun(Sampler):
    """Second order: a DDIM step, then the same step with the mean of both ends' eps (Karras et al. 2022,
    arXiv:2206.00364, algorithm 1, for any alpha_t).

    In y = x/alpha, r = sigma/alpha: y_s = y_t + (r_s - r_t) (eps_t + eps_s)/2. The step onto the clean level is
    DDIM's, so N steps cost 2N - 1 network calls. It wants a spacing that is dense near the clean end and starts at
    a bounded r: Karras's, which ``sampler=heun`` brings along.
    """

    order = 2

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Level,
        s: Level,
        schedule: Schedule,
        noise: Callable[[], Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        x_0_hat = denoise(x_t, t)
        if s.sigma == 0:
            return s.alpha * x_0_hat
        eps_t = (x_t - t.alpha * x_0_hat) / t.sigma
        euler = s.alpha * x_0_hat + s.sigma * eps_t
        eps_s = (euler - s.alpha * denoise(euler, s)) / s.sigma
        return euler + s.alpha * (s.sigma / s.alpha - t.sigma / t.alpha) / 2 * (eps_s - eps_t)
