"""Stochastic DPM-Solver++: the reverse SDE instead of the flow (Lu et al. 2022, arXiv:2211.01095, section 5).

A step's noise is an exact Ito integral, hence a normal, and the normals are each sample's own, addressed by its seed.
Nothing ties the noise of a walk of N steps to that of another number of steps, as one Brownian path would: samples at
N and 2N are two draws, not two approximations of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.arguments import Unbounded
from denoiselab.sampler.base import Rung, Sampler, Walk
from denoiselab.sampler.ddim import ancestral, ddim
from denoiselab.sampler.exponential import Multistep, Rule, constant, linear, midpoint, quadratic_as_published
from denoiselab.sampler.spacing import Spacing


class DPMpp2MSDE(Multistep):
    """x_s = (sigma_s/sigma_t) e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) (x_0_t + D/2)
    + sigma_s sqrt(1 - e^(-2 eta h)) z, D as in DPMpp2M (arXiv:2211.01095, SDE-DPM-Solver++(2M), where eta = 1).

    N calls and N - 1 draws.

    Args:
        spacing, steps, clip, reach: as for Multistep.
        eta: noise put in, >= 0; 0 is DPMpp2M, 1 the reverse SDE, of which DDPM is the first-order walk.
    """

    rules = (constant, midpoint)

    def __init__(
        self, spacing: Spacing, steps: int = 20, clip: float | None = None, eta: float = 1.0, reach: Unbounded = 2.0
    ):
        super().__init__(spacing, steps, clip, reach)
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta={eta}: need a finite number >= 0; 0 is deterministic")
        self.eta = eta

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        estimates = self.latest(walk, t, s, x_0_hat)
        eta_h = self.eta * (s.half_log_snr - t.half_log_snr)
        x_s = (s.sigma / t.sigma * math.exp(-eta_h)) * x_t
        for w, each in zip(self.weights(t, s, estimates, rate=1 + self.eta), estimates, strict=True):
            x_s.add_(each.value, alpha=s.alpha * w)
        return x_s.add_(walk.noise(), alpha=s.sigma * math.sqrt(-math.expm1(-2 * eta_h))) if self.eta else x_s


class DPMpp3MSDE(DPMpp2MSDE):
    """DPMpp2MSDE with three estimates, as in k-diffusion's ``sample_dpmpp_3m_sde``: lines through two estimates, the
    parabola through three with DPMpp3M's halved curvature, and no fewer estimates at the end of a short walk."""

    rules: tuple[Rule, ...] = (constant, linear, quadratic_as_published)
    few = 0


class DPMppSDE(Sampler):
    """DDIM's step with its eta to the middle lambda, and again from t to s with the middle's estimate: k-diffusion's
    ``sample_dpmpp_sde`` with r = 1/2; DPMpp2S where eta = 0.

    Both steps see one Wiener path: the middle's noise, carried on from there, is a part of the step's. Drawn anew it
    would leave the variance of the data right to first order only, not to second. A step calls the network twice and
    draws twice, and onto the clean level it calls once: 2N - 1 calls.

    Args:
        spacing, steps, clip: as for Sampler.
        eta: as for DDIM, in [0, 1].
    """

    def __init__(self, spacing: Spacing, steps: int = 10, clip: float | None = None, eta: float = 1.0):
        super().__init__(spacing, steps, clip)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: need a number in [0, 1]; 0 is deterministic")
        self.eta = eta

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        m = walk.at((t.half_log_snr + s.half_log_snr) / 2)
        kept, d = ancestral(t, s, self.eta)
        kept_m, d_m = ancestral(t, m, self.eta)
        carried = ancestral(m, s, self.eta)[0] * d_m
        z_m = walk.noise() if self.eta else torch.zeros_like(x_t)
        x_m = ddim(x_t, x_0_hat, t, m, kept_m).add_(z_m, alpha=d_m)
        x_s = ddim(x_t, walk.denoise(x_m, m), t, s, kept)
        if self.eta:
            x_s.add_(z_m, alpha=carried).add_(walk.noise(), alpha=math.sqrt(d**2 - carried**2))
        return x_s
