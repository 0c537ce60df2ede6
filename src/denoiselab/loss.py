"""Training losses, per sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.schedule import Schedule
from denoiselab.weighting import Weighting


class Loss(nn.Module):
    """A loss per sample, and what it is made of."""

    formula: str
    """What is minimised, for people to read."""

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, parts): loss of shape (B,) with its graph; parts detached, shape (B,), always with ``mse``, the
        mean squared x_0 error.

        Args:
            x_0, eps: data and standard normal noise, (B, ...).
            t: times in [0, 1], (B, 1, ...).
        """
        raise NotImplementedError


class WeightedLoss(Loss):
    """w_t mean((x_0_hat(x_t) - x_0)^2): the mean over a sample's values of its squared x_0 error, weighted.

    Args:
        weighting: w_t.
    """

    def __init__(self, weighting: Weighting):
        super().__init__()
        self.weighting = weighting
        self.formula = f"({weighting.formula}) * mean |x_0_hat - x_0|^2"

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alpha_t, sigma_t = schedule(t)
        x_0_hat = denoiser(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
        error = (x_0_hat - x_0).square().flatten(1).mean(1)
        loss = self.weighting.apply(error, alpha_t.flatten(), sigma_t.flatten(), schedule.rate(t).flatten())
        return loss, {"mse": error.detach()}
