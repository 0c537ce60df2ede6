"""The hybrid loss as it is commonly taught, with a fixed variance."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from denoiselab.denoiser import Denoiser
from denoiselab.gaussian import beta_share, log_snr_before
from denoiselab.loss.base import Loss
from denoiselab.schedule import Schedule, log_snr
from denoiselab.target import Target


class Hybrid(Loss):
    """(1 + scale w_t) mean |y_hat - y|^2, w_t = beta/(2 alpha (1 - abar)): the target's plain MSE plus a small share of
    the same MSE with the bound's weights for eps and the variance beta.

    What tutorials call the hybrid loss. It is not a bound, for it has neither a learned variance nor the terms of the
    prior and the decoder, its mean over points stands for a sum, and its weights are those for eps whatever the
    target. w_t is between 0.005 and 0.5 on the linear schedule, so that with scale = 0.001 no weight moves by more
    than 0.05%: it cannot be told from the plain MSE. ``LearnedHybrid`` is the published one.

    Args:
        target: the run's.
        scale: share of the weighted MSE, >= 0.
        clamp: bound on w_t, > 0; None for none. w_t is at most 0.5 at low noise and reaches 500 at the last point of
            the cosine schedule, where 1 - beta nearly vanishes; where alpha_1 = 0 it has no bound.
        points: T for schedules in continuous time, >= 2; a table has its own.
    """

    def __init__(self, target: Target, scale: float = 1e-3, clamp: float | None = None, points: int = 1000):
        super().__init__()
        if not scale >= 0:
            raise ValueError(f"scale={scale}: need a number >= 0, such as 0.001")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp={clamp}: need a number > 0, such as 100, or null for none")
        if points < 2:
            raise ValueError(f"points={points}: need at least 2")
        self.target, self.scale, self.points = target, scale, points
        self.clamp = math.inf if clamp is None else clamp
        w = "beta/(2 alpha (1 - abar))" if clamp is None else f"min(beta/(2 alpha (1 - abar)), {clamp:g})"
        self.formula = f"(1 + {scale:g} {w}) * ({target.snr_weight}) * mean |x_0_hat - x_0|^2"

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alpha_t, sigma_t = schedule(t)
        x_0_hat = denoiser(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
        error = (x_0_hat - x_0).square().flatten(1).mean(1)
        simple = self.target.precision(alpha_t, sigma_t).flatten() * error
        vlb = self.weight(schedule, t.flatten()).to(error.dtype) * simple
        parts = {"mse": error, "simple": simple, "vlb": vlb}
        return simple + self.scale * vlb, {name: part.detach() for name, part in parts.items()}

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """w_t in float64, shaped like t."""
        now = log_snr(*schedule(t.double()))
        before = log_snr_before(schedule, t, schedule.points or self.points)
        return (beta_share(now, before) / (2 * now.sigmoid())).clamp_max(self.clamp)
