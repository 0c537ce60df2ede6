"""A sampler of one's own."""

import math

from torch import Tensor

from denoiselab.sampler import Rung, Sampler, Walk


class Multistep(Sampler):
    """x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) (x_0_hat + (x_0_hat - x_0_before)/(2 r)).

    DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): h is the step in lambda = log_snr/2, r the step
    before it over h. The first step is DDIM's. One network call per step.
    """

    order = 2

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        h, estimate = s.half_log_snr - t.half_log_snr, x_0_hat
        if walk.memory:
            estimate = x_0_hat + (x_0_hat - walk.memory["x_0_hat"]) * h / (2 * walk.memory["h"])
        walk.memory.update(x_0_hat=x_0_hat, h=h)
        return s.sigma / t.sigma * x_t - s.alpha * math.expm1(-h) * estimate
