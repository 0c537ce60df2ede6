"""DPM-Solver: exponential integrators that predict the noise (Lu et al. 2022, arXiv:2206.00927).

Order 1 is DDIM. Guided walks are more stable with data prediction: see dpmpp.
"""

from __future__ import annotations

import math

from torch import Tensor

from denoiselab.sampler.base import Rung, Sampler, Walk
from denoiselab.sampler.ddim import ddim
from denoiselab.sampler.exponential import Multistep, constant, midpoint, phi, quadratic, quadratic_as_published


class DPMSolver2(Sampler):
    """x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) eps_hat at the middle lambda, reached by DDIM
    (arXiv:2206.00927, algorithm 1, r_1 = 1/2).

    Written as DDIM's step plus what the middle changes: eps_hat there is eps_hat_t + (alpha/sigma)(x_0_t - x_0_hat), so
    that nothing large cancels. A step calls the network twice, and once onto the clean level: 2N - 1 calls.
    """

    order = 2

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_t = walk.denoise(x_t, t)
        h = s.half_log_snr - t.half_log_snr
        middle = walk.at(t.half_log_snr + h / 2)
        x_0_m = walk.denoise(ddim(x_t, x_0_t, t, middle), middle)
        gain = s.sigma * math.expm1(h) / middle.ratio
        return ddim(x_t, x_0_t, t, s).add_(x_0_m - x_0_t, alpha=gain)


class DPMSolver3(Sampler):
    """Third order, through levels at r_1 = 1/3 and r_2 = 2/3 of the way in lambda (arXiv:2206.00927, algorithm 2).

    With D_i = eps_hat_i - eps_hat_t and c(h) = h phi_2(h) = (e^h - 1)/h - 1:
    u_1 is DDIM's, u_2 = DDIM's - sigma_2 (r_2/r_1) c(r_2 h) D_1, and x_s = DDIM's - sigma_s c(h)/r_2 D_2.
    Written in differences of x_0_hat, as DPMSolver2. Three calls a step, one onto the clean level: 3N - 2.
    """

    order = 3

    @property
    def nfe(self) -> int:
        return 3 * self.steps - 2

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_t = walk.denoise(x_t, t)
        h = s.half_log_snr - t.half_log_snr
        one, two = (walk.at(t.half_log_snr + r * h) for r in (1 / 3, 2 / 3))
        change_1 = walk.denoise(ddim(x_t, x_0_t, t, one), one) - x_0_t
        gain_1 = 2 * (2 / 3 * h) * phi(2, 2 / 3 * h) / one.ratio
        x_two = ddim(x_t, x_0_t, t, two).add_(change_1, alpha=two.sigma * gain_1)
        change_2 = walk.denoise(x_two, two) - x_0_t
        gain_2 = s.sigma * 3 / 2 * h * phi(2, h)
        x_s = ddim(x_t, x_0_t, t, s)
        return x_s.add_(change_2, alpha=gain_2 / two.ratio).add_(change_1, alpha=-gain_2 * gain_1)


class DPMSolver2M(Multistep):
    """x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) (eps_hat_t + D/2), D = (h/h') (eps_hat_t - eps_hat_t'), where t'
    is the level before t and h' the step from it (the multistep form of arXiv:2206.00927, in the authors' code).

    Computed as DDIM's step and what earlier noises differ from the latest: nothing large cancels. N calls.
    """

    order = 2
    rules = (constant, midpoint)

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        eps_hat = (x_t / t.sigma).sub_(x_0_hat, alpha=t.alpha / t.sigma)
        estimates = self.latest(walk, t, s, eps_hat)
        _, *earlier = self.weights(t, s, estimates, rate=-1)
        x_s = ddim(x_t, x_0_hat, t, s).sub_(eps_hat, alpha=s.sigma * sum(earlier))
        for w, each in zip(earlier, estimates[1:], strict=True):
            x_s.add_(each.value, alpha=s.sigma * w)
        return x_s


class DPMSolver3M(DPMSolver2M):
    """DPMSolver2M with three estimates, as published: of second order, because D2 is taken for twice what it is."""

    rules = (constant, midpoint, quadratic_as_published)


class DPMSolver3MCorrected(DPMSolver2M):
    """The same with D2 doubled: of third order, once the first steps are past."""

    order = 3
    rules = (constant, midpoint, quadratic)
