"""The hybrid loss of a network that also says the variance of its steps."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from denoiselab.denoiser import Denoiser, LearnedVariance
from denoiselab.gaussian import discretised_gaussian_nll, gaussian_kl, gaussian_nll, point_before
from denoiselab.loss.base import Loss
from denoiselab.schedule import Schedule
from denoiselab.weighting import Weighting


class LearnedHybrid(Loss):
    """L_simple + scale L_vlb (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16, section 3): the weighted squared
    error trains x_0_hat, and the bound trains the variance alone, since x_0_hat enters it without gradient.

    L_vlb = T KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in bits per dimension, s being the point before t; at the first
    point the decoder's -log p(x_0 | x_t) takes the place of the divergence. Its mean over the T points is the bound
    but for the prior's term. In bits, and with scale = 0.001, it is what the paper's published code minimises. The
    variance is exp(v log beta + (1 - v) log beta_tilde), and at the first point, where beta_tilde is 0, that of the
    second stands in.

    Args:
        weighting: of the squared x_0 error: SNR for L_simple.
        scale: lambda, >= 0.
        bins: levels of the data, equally spaced from -1 to 1, >= 2; None for continuous values, whose decoder is a
            density.
        points: T for schedules in continuous time, >= 2; a table has its own.
    """

    denoiser: ClassVar[type[Denoiser]] = LearnedVariance

    def __init__(self, weighting: Weighting, scale: float = 1e-3, bins: int | None = None, points: int = 1000):
        super().__init__()
        if not scale >= 0:
            raise ValueError(f"scale={scale}: need a number >= 0, such as 0.001")
        if bins is not None and bins < 2:
            raise ValueError(f"bins={bins}: need at least 2, such as 256, or null for continuous values")
        if points < 2:
            raise ValueError(f"points={points}: need at least 2")
        self.weighting, self.scale, self.bins, self.points = weighting, scale, bins, points
        self.formula = f"({weighting.formula}) * mean |x_0_hat - x_0|^2{weighting.added} + {scale:g} L_vlb(variance)"

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alpha_t, sigma_t = schedule(t)
        says = denoiser.outputs(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
        error = (says.x_0 - x_0).square().flatten(1).mean(1)
        rate = schedule.rate(t).flatten()
        simple = self.weighting.apply(error, alpha_t.flatten(), sigma_t.flatten(), rate)
        vlb = self.bound(schedule, t, x_0, says.x_0.detach(), says.variance)
        parts = {"mse": error, "simple": simple, "vlb": vlb}
        return simple + self.scale * vlb, {name: part.detach() for name, part in parts.items()}

    def bound(self, schedule: Schedule, t: Tensor, x_0: Tensor, x_0_hat: Tensor, v: Tensor | None) -> Tensor:
        """L_vlb of each sample, (B,)."""
        assert v is not None
        points = schedule.points or self.points
        s, first = point_before(schedule, t, points)
        now, before = schedule(t.double()), schedule(s)
        # In units of q(x_s | x_t, x_0)'s standard deviation, so that nothing small is subtracted from its like.
        snr_gain = now.log_snr.exp() * (before.log_snr - now.log_snr).expm1()
        scale = snr_gain.sqrt().to(v.dtype)
        log_range = (logsigmoid(-now.log_snr) - logsigmoid(-before.log_snr)).to(v.dtype)  # log beta/beta_tilde
        divergence = gaussian_kl(scale * x_0, torch.zeros_like(v), scale * x_0_hat, v * log_range)

        decoder = self.decoder(schedule, t, points, x_0, torch.where(first, x_0_hat, x_0), v)
        return torch.where(first, decoder, divergence).flatten(1).mean(1) * (points / math.log(2))

    def decoder(self, schedule: Schedule, t: Tensor, points: int, x_0: Tensor, x_0_hat: Tensor, v: Tensor) -> Tensor:
        """-log p(x_0 | x_t) at the first point, in nats per value; elsewhere finite and without meaning."""
        step = 1 / (points - 1)
        t = t.double().clamp_max(step / 2)
        one, two = schedule.log_snr(t), schedule.log_snr((t + step).clamp_max(1))
        log_beta = logsigmoid(-one)
        log_beta_tilde = log_beta + (-(two - one).expm1()).log()  # of the second point
        log_variance = v * log_beta.to(v.dtype) + (1 - v) * log_beta_tilde.to(v.dtype)
        if self.bins is None:
            return gaussian_nll(x_0, x_0_hat, log_variance)
        return discretised_gaussian_nll(x_0, x_0_hat, log_variance, self.bins)
