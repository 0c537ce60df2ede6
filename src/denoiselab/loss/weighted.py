"""The weighted squared error: nearly every loss there is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from denoiselab.denoiser import Denoiser
from denoiselab.loss.base import Loss
from denoiselab.schedule import Schedule
from denoiselab.weighting import Weighting


class WeightedLoss(Loss):
    """w_t mean((x_0_hat(x_t) - x_0)^2): the mean over a sample's values of its squared x_0 error, weighted.

    Args:
        weighting: w_t; one that learns is trained along.
    """

    def __init__(self, weighting: Weighting):
        super().__init__()
        self.weighting = weighting
        self.formula = f"({weighting.formula}) * mean |x_0_hat - x_0|^2{weighting.added}"

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alpha_t, sigma_t = schedule(t)
        x_0_hat = denoiser(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
        error = (x_0_hat - x_0).square().flatten(1).mean(1)
        loss = self.weighting.apply(error, alpha_t.flatten(), sigma_t.flatten(), schedule.rate(t).flatten())
        return loss, {"mse": error.detach()}
