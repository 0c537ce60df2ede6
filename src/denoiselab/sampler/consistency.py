"""Multistep consistency sampling: jump to the data, put noise back, jump again."""

from __future__ import annotations

import math

from torch import Tensor

from denoiselab.consistency import SIGMA_MIN
from denoiselab.sampler.base import Rung, Sampler, Walk
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import Schedule


class Consistency(Sampler):
    """x_s = alpha_s (f(x_t) + sqrt(r_s^2 - r_min^2) z), r = sigma/alpha (Song et al. 2023, arXiv:2303.01469,
    algorithm 1, for any alpha_t).

    Where f is a consistency function, which sends x_t to its path's end at r_min, every x_s has the law of noisy data
    for any N: more steps only repair what a learned f lacks. A plain denoiser, whose x_0_hat is the mean of many ends,
    is accepted too, but its samples are too narrow however many steps there are. The levels are N + 1
    of the spacing without the cleanest, where f has nothing left to do: ``sampler=consistency`` brings Karras's, which
    start where such networks are trained.

    Args:
        spacing, steps, clip: as for Sampler.
        sigma_min: r_min of the consistency function, > 0.
    """

    order = None

    def __init__(self, spacing: Spacing, steps: int = 2, clip: float | None = None, sigma_min: float = SIGMA_MIN):
        super().__init__(spacing, steps, clip)
        if not sigma_min > 0:
            raise ValueError(f"sigma_min={sigma_min}: need a number > 0, such as {SIGMA_MIN}")
        self.sigma_min = sigma_min

    def levels(self, schedule: Schedule) -> list[Rung]:
        """N noisy levels and the clean one."""
        *noisy, _, clean = Sampler(self.spacing, self.steps + 1).levels(schedule)
        return [*noisy, clean]

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        added = math.sqrt(max(s.sigma**2 - (s.alpha * self.sigma_min) ** 2, 0.0))
        return (s.alpha * x_0_hat).add_(walk.noise(), alpha=added)
