"""Heun's method on the probability-flow ODE, in two of its times."""

from __future__ import annotations

from torch import Tensor

from denoiselab.sampler.base import NOISE, Rung, Sampler, Walk
from denoiselab.sampler.ddim import ddim


class Heun(Sampler):
    """Second order: a DDIM step, then the same step with the mean of both ends' eps (Karras et al. 2022,
    arXiv:2206.00364, algorithm 1, for any alpha_t).

    In y = x/alpha, r = sigma/alpha: y_s = y_t + (r_s - r_t) (eps_t + eps_s)/2, which is the DDIM step plus
    alpha_s (r_t - r_s)/(2 r_s) (x_0_s - x_0_t). From levels beyond r = 1,000, where such steps lead nowhere, the
    trapezoid is taken in 1/r instead: the DDIM step with the mean of both ends' x_0, which divides by r_t, not by r_s.
    The step onto the clean level is DDIM's, so N steps cost 2N - 1 network calls. It wants a spacing that is dense near
    the clean end and starts at a bounded r: Karras's, which ``sampler=heun`` brings along.
    """

    order = 2

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_t = walk.denoise(x_t, t)
        euler = ddim(x_t, x_0_t, t, s)
        change = walk.denoise(euler, s) - x_0_t
        return euler.add_(change, alpha=self.gain(t, s) / 2)

    def gain(self, t: Rung, s: Rung) -> float:
        """What the DDIM step from t to s gains by a change of its slope, per change of x_0."""
        return s.alpha * (t.ratio - s.ratio) / (t.ratio if t.ratio > NOISE else s.ratio)


class FlowHeun(Heun):
    """Heun's method in flow time: z_s = z_t + (tau_s - tau_t) (u_t + u_s)/2 for z = x/(alpha + sigma),
    tau = sigma/(alpha + sigma) and dz/dtau = u = eps_hat - x_0_hat = (z - x_0_hat)/tau.

    These are the straight path's own coordinates (Lipman et al. 2023, arXiv:2210.02747, eq. 20-22), and every other
    path's by its sigma/alpha. Unlike sigma/alpha they are finite at pure noise, so that any spacing will do.
    """

    def gain(self, t: Rung, s: Rung) -> float:
        # u_s - u_t = (x_0_t - x_0_s)/tau_s, and (alpha_s + sigma_s)/tau_s = (alpha_s + sigma_s)^2/sigma_s
        return (t.flow_time - s.flow_time) * (s.alpha + s.sigma) ** 2 / s.sigma
