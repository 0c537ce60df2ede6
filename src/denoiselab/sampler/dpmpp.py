"""DPM-Solver++: exponential integrators that predict the data (Lu et al. 2022, arXiv:2211.01095).

Estimates of x_0 stay bounded under strong guidance, where differences of noises are multiplied by e^h.
"""

from __future__ import annotations

from torch import Tensor

from denoiselab.sampler.base import Rung, Sampler, Walk
from denoiselab.sampler.ddim import ddim
from denoiselab.sampler.exponential import Multistep, constant, midpoint, quadratic, quadratic_as_published


class DPMpp2S(Sampler):
    """x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) x_0_hat at the middle lambda, reached by DDIM
    (arXiv:2211.01095, algorithm 1, r = 1/2): DDIM's step with the middle's estimate.

    A step calls the network twice, and once onto the clean level: 2N - 1 calls.
    """

    order = 2

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        middle = walk.at((t.half_log_snr + s.half_log_snr) / 2)
        return ddim(x_t, walk.denoise(ddim(x_t, x_0_hat, t, middle), middle), t, s)


class DPMpp2M(Multistep):
    """x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) (x_0_t + D/2), D = (h/h') (x_0_t - x_0_t'), where t' is the
    level before t and h' the step from it (arXiv:2211.01095, algorithm 2). N calls."""

    order = 2
    rules = (constant, midpoint)


class DPMpp3M(Multistep):
    """DPMpp2M with three estimates, as published: x_s = DDIM's + alpha_s (c_1 D1 + c_2 D2), c_1 = h phi_2(-h),
    c_2 = h phi_3(-h), with D1 and D2 the slope and the curvature of the parabola through the estimates.

    Of second order: the second derivative is twice D2. At fewer than about 64 steps it is none the worse for it.
    """

    order = 2
    rules = (constant, midpoint, quadratic_as_published)


class DPMpp3MCorrected(Multistep):
    """DPMpp3M with D2 doubled: of third order, once the first steps are past."""

    order = 3
    rules = (constant, midpoint, quadratic)
