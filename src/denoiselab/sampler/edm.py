"""EDM's stochastic sampler."""

from __future__ import annotations

import math

from torch import Tensor

from denoiselab.arguments import Unbounded
from denoiselab.sampler.base import Rung, Walk
from denoiselab.sampler.heun import Heun
from denoiselab.sampler.spacing import Spacing


class EDMStochastic(Heun):
    """Before Heun's step, noise is added: from r = sigma/alpha up to (1 + gamma) r, gamma = min(S_churn/N, sqrt(2) - 1)
    where S_min <= r <= S_max, else 0 (Karras et al. 2022, arXiv:2206.00364, algorithm 2, for any alpha_t).

    The noise covers up the errors of earlier steps. S_churn = 0 is Heun. The paper's values for ImageNet-64 are
    N = 256, 40, 0.05, 50 and 1.003; an S_noise above 1 makes up for a network that takes out too much noise, and is
    wrong by as much for a denoiser that does not.

    Args:
        spacing, steps, clip: as for Sampler.
        s_churn: noise added on the whole walk, >= 0.
        s_min, s_max: the levels at which it is added, in units of sigma/alpha, 0 <= s_min <= s_max.
        s_noise: the standard deviation of the added noise, > 0.
    """

    def __init__(
        self,
        spacing: Spacing,
        steps: int = 256,
        clip: float | None = None,
        s_churn: float = 40.0,
        s_min: float = 0.05,
        s_max: Unbounded = 50.0,
        s_noise: float = 1.0,
    ):
        super().__init__(spacing, steps, clip)
        if not s_churn >= 0:
            raise ValueError(f"s_churn={s_churn}: need a number >= 0; 0 is deterministic")
        if not s_min >= 0:
            raise ValueError(f"s_min={s_min}: need a number >= 0")
        if not s_max >= s_min:
            raise ValueError(f"s_max={s_max}: need a number >= s_min = {s_min}")
        if not s_noise > 0:
            raise ValueError(f"s_noise={s_noise}: need a number > 0, such as 1")
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        return super().step(walk, *self.churned(walk, x_t, t), s)

    def finish(self, walk: Walk, x_t: Tensor, t: Rung) -> Tensor:
        return super().finish(walk, *self.churned(walk, x_t, t))

    def churned(self, walk: Walk, x_t: Tensor, t: Rung) -> tuple[Tensor, Rung]:
        """x_t and its level, with noise added where it is to be."""
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        if not (gamma > 0 and self.s_min <= t.ratio <= self.s_max):
            return x_t, t
        noisier = Rung(t.alpha, (1 + gamma) * t.sigma)
        added = self.s_noise * math.sqrt(noisier.sigma**2 - t.sigma**2)
        return x_t.add(walk.noise(), alpha=added), noisier
