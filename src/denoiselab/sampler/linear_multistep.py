"""Linear multistep methods: Adams and Bashforth's, with four estimates and one network call a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.sampler.base import NOISE, Rung, Sampler, Walk, rungs
from denoiselab.sampler.ddim import ddim
from denoiselab.sampler.exponential import Estimate, Multistep, weights
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import RATIO, Schedule

EQUAL_STEPS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -4 / 3, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -3 / 8))
"""Adams and Bashforth's weights of the last one to four slopes, the latest first."""


class PNDM(Sampler):
    """x_s = DDIM's step with eps = (55 eps_t - 59 eps_1 + 37 eps_2 - 9 eps_3)/24, eps_1 ... being those of the steps
    before (F-PNDM of Liu et al. 2022, arXiv:2202.09778, algorithm 2, for any alpha_t).

    The first three steps are Runge and Kutta's with DDIM's step for the straight line, by way of the middle of a step
    in t (algorithm 2's PRK); with the slopes that they leave, N >= 4 steps cost N + 9 network calls. With N < 4, all
    steps but the last are such, and the last one weights the slopes there are. The weights would be of fourth order for
    equal steps in sigma/alpha; no spacing has those, and the order is 2.

    Where sigma/alpha > 1,000 steps are taken in x_0 instead of eps. The paper starts from less noise: from spacing
    leading, which ``sampler=pndm`` brings along.
    """

    order = 2

    @property
    def nfe(self) -> int:
        return self.steps + 3 * min(3, self.steps - 1)

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        slopes = latest(walk, x_t, x_0_hat, t)
        if len(slopes) < 4:
            return runge_kutta(walk, x_t, x_0_hat, t, s)
        return ddim(x_t, adams_bashforth(slopes, x_t, x_0_hat, t), t, s)

    def finish(self, walk: Walk, x_t: Tensor, t: Rung) -> Tensor:
        """The x_0 of the slopes that there are, weighted."""
        x_0_hat = walk.denoise(x_t, t)
        x_0_hat = adams_bashforth(latest(walk, x_t, x_0_hat, t), x_t, x_0_hat, t)
        return x_0_hat if self.clip is None else x_0_hat.clamp(-self.clip, self.clip)


def latest(walk: Walk, x_t: Tensor, x_0_hat: Tensor, t: Rung) -> list[Tensor]:
    """The slopes eps_hat at the last levels, a new one first, four at most."""
    slopes = walk.memory["slopes"] = [eps_hat(x_t, x_0_hat, t), *walk.memory.get("slopes", ())][:4]
    return slopes


def adams_bashforth(slopes: Sequence[Tensor], x_t: Tensor, x_0_hat: Tensor, t: Rung) -> Tensor:
    """The x_0 of the weighted slopes; the estimate itself where there is little but noise."""
    return x_0_hat if t.ratio > NOISE else x_0_of(x_t, weighted(EQUAL_STEPS[len(slopes) - 1], slopes), t)


def runge_kutta(walk: Walk, x_t: Tensor, x_0_hat: Tensor, t: Rung, s: Rung) -> Tensor:
    """x_s by Runge and Kutta's method, DDIM's step being the straight line; three further network calls."""

    def slope(x: Tensor, x_0: Tensor, level: Rung) -> Tensor:
        return x_0 if t.ratio > NOISE else eps_hat(x, x_0, level)

    def along(k: Tensor, to: Rung) -> Tensor:
        return ddim(x_t, k if t.ratio > NOISE else x_0_of(x_t, k, t), t, to)

    m, slopes = middle(walk.schedule, t, s), [slope(x_t, x_0_hat, t)]
    for level in (m, m, s):
        x = along(slopes[-1], level)
        slopes.append(slope(x, walk.denoise(x, level), level))
    return along(weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), slopes), s)


class AB4(Multistep):
    """x_s = (sigma_s/sigma_t) x_t + sigma_s int x_0_hat d(alpha/sigma) from t to s, x_0_hat being the cubic in
    sigma/alpha through the last four estimates: Adams and Bashforth's method of fourth order, for steps of any length.

    The linear part of the flow is solved exactly (the exponential form of Hochbruck and Ostermann 2010,
    doi:10.1017/S0962492910000048, section 2.5), so steps may be long where there is little but noise. x_0_hat is smooth
    in sigma/alpha down to 0. In log(sigma/alpha), where the published multistep methods have their polynomials, the
    last steps of a spacing that is even in t are so long that a cubic through the steps before leads nowhere.

    The first three steps know fewer estimates and have orders 1 to 3: what they are off by is divided by sigma/alpha
    there, and falls as N^-2. N calls.
    """

    order = 4

    def __init__(self, spacing: Spacing, steps: int = 20, clip: float | None = None):
        super().__init__(spacing, steps, clip, reach=math.inf)

    @property
    def most(self) -> int:
        return 4

    def weights(self, t: Rung, s: Rung, estimates: Sequence[Estimate], rate: float = 1.0) -> list[float]:
        way = 1 - s.ratio / t.ratio
        nodes = [(1 - math.exp(t.half_log_snr - each.half_log_snr)) / way for each in estimates]
        return weights(nodes, moments(way, len(nodes)))


def moments(way: float, n: int) -> list[float]:
    """(1 - way) int (q/way)^k / (1 - q)^2 dq from 0 to way, k = 0 .. n - 1, where q = 1 - r/r_t.

    >>> [round(value / 0.001, 2) for value in moments(0.001, 4)]
    [1.0, 0.5, 0.33, 0.25]
    """
    once, twice = -math.log1p(-way), way / (1 - way)  # int q^k/(1 - q) dq, int q^k/(1 - q)^2 dq
    found = [way]
    for k in range(1, n):
        twice -= once
        once -= way**k / k
        found.append((1 - way) * twice / way**k)
    return found


def weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = weights[0] * values[0]
    for w, value in zip(weights[1:], values[1:], strict=True):
        total.add_(value, alpha=w)
    return total


def eps_hat(x_t: Tensor, x_0_hat: Tensor, t: Rung) -> Tensor:
    return (x_t - t.alpha * x_0_hat) / t.sigma


def x_0_of(x_t: Tensor, eps: Tensor, t: Rung) -> Tensor:
    return (x_t - t.sigma * eps) / t.alpha


def middle(schedule: Schedule, t: Rung, s: Rung) -> Rung:
    """The level in the middle between two in time. Pure noise, whose alpha is held, has the time 1; the inverse of its
    held log-SNR is a little before that on some schedules, and 1 on others of the same levels."""
    times = schedule.inverse(torch.tensor([2 * t.half_log_snr, 2 * s.half_log_snr], dtype=torch.float64))
    if t.ratio > RATIO * (1 - 1e-9):
        times[0] = 1.0
    (found,) = rungs(schedule(times.mean()))
    return found
