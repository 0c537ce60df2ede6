"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from denoiselab.sampler.base import Denoise, Rung, Sampler
from denoiselab.sampler.ddim import ddim
from denoiselab.schedule import RATIO, Schedule


class Heun(Sampler):
    """Second order: a DDIM step, then the same step with the mean of both ends' eps (Karras et al. 2022,
    arXiv:2206.00364, algorithm 1, for any alpha_t).

    In y = x/alpha, r = sigma/alpha: y_s = y_t + (r_s - r_t) (eps_t + eps_s)/2, which is the DDIM step plus
    alpha_s (r_t - r_s)/(2 r_s) (x_0_s - x_0_t). From pure noise, where r_t is infinite, it is the DDIM step with the
    mean of both ends' x_0 instead. The step onto the clean level is DDIM's, so N steps cost 2N - 1 network calls. It
    wants a spacing that is dense near the clean end and starts at a bounded r: Karras's, which ``sampler=heun``
    brings along.
    """

    order = 2

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Rung,
        s: Rung,
        schedule: Schedule,
        noise: Callable[[], Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        x_0_t = denoise(x_t, t)
        if s.sigma == 0:
            return s.alpha * x_0_t
        euler = ddim(x_t, x_0_t, t, s)
        change = denoise(euler, s) - x_0_t
        gain = (t.ratio - s.ratio) / s.ratio if t.ratio < RATIO else 1.0
        return euler.add_(change, alpha=s.alpha * gain / 2)
