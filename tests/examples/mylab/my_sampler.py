"""A sampler of one's own."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from denoiselab.sampler import Sampler
from denoiselab.sampler.base import Denoise, Rung
from denoiselab.schedule import Schedule


class Multistep(Sampler):
    """x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) (x_0_hat + (x_0_hat - x_0_before)/(2 r)).

    DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): h is the step in lambda = log_snr/2, r the step
    before it over h. The first step and the one onto the clean level are DDIM's. One network call per step.
    """

    order = 2

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
        x_0_hat = denoise(x_t, t)
        if s.sigma == 0:
            return s.alpha * x_0_hat
        h, estimate = s.half_log_snr - t.half_log_snr, x_0_hat
        if memory:
            estimate = x_0_hat + (x_0_hat - memory["x_0_hat"]) * h / (2 * memory["h"])
        memory["x_0_hat"], memory["h"] = x_0_hat, h
        return s.sigma / t.sigma * x_t - s.alpha * math.expm1(-h) * estimate
