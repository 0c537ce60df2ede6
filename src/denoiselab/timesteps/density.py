"""Times from a density that is itself the objective: losses are not weighted back to uniform t.

Each is stratified over the global batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.curve import Curve
from denoiselab.schedule import RATIO, Schedule
from denoiselab.timesteps.base import histogram_icdf
from denoiselab.timesteps.uniform import Stratified


class LogitNormal(Stratified):
    """logit(t) ~ N(loc, scale^2), t = sigmoid(loc + scale z) (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Args:
        loc: the logit of the median; above 0 favours noisy levels.
        scale: > 0.
    """

    def __init__(self, loc: float = 0.0, scale: float = 1.0, steps: int | None = None):
        super().__init__(steps)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: need a number > 0, such as 1")
        self.loc, self.scale = loc, scale

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (self.loc + self.scale * torch.special.ndtri(u)).sigmoid()


class LogNormal(Stratified):
    """ln(sigma_t/alpha_t) ~ N(p_mean, p_std^2), and t where the schedule has that level (Karras et al. 2022,
    arXiv:2206.00364, table 1), so that every schedule trains on the same levels.

    What lies beyond the schedule's cleanest or noisiest level is drawn at that end: the ends carry the tails'
    probabilities as point masses. The published -1.2 and 1.2 are for data of standard deviation 0.5; for others the
    mean is moved by ln(2 sigma_data), so that sigma is the same in units of the data.

    Args:
        p_mean: mean of ln sigma for data of standard deviation 0.5.
        p_std: its standard deviation, > 0.
        sigma_data: the root mean square of x_0, > 0.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, sigma_data: float = 0.5, steps: int | None = None):
        super().__init__(steps)
        if not 0 < p_std < math.inf:
            raise ValueError(f"p_std={p_std}: need a number > 0, such as 1.2")
        self.mean, self.p_std = p_mean + math.log(2 * sigma_data), p_std

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        log_sigma = self.mean + self.p_std * torch.special.ndtri(u)
        return schedule.inverse(-2 * log_sigma.clamp(-math.log(RATIO), math.log(RATIO)))  # u = 0 is -infinity


class Mode(Stratified):
    """t = 1 - v - s (cos^2(pi v / 2) - 1 + v) for uniform v (Esser et al. 2024, arXiv:2403.03206, eq. 20), written
    with u = 1 - v, in which it rises: t = u - s (sin^2(pi u / 2) - u).

    The density is highest at t = 1/2 for s > 0 and at the ends for s < 0; s = 0 is uniform.

    Args:
        s: in [-1, 2/(pi - 2)] = [-1, 1.7519], where t rises with u.
    """

    def __init__(self, s: float = 1.29, steps: int | None = None):
        super().__init__(steps)
        if not -1 <= s <= 2 / (math.pi - 2):
            raise ValueError(f"s={s}: need a number in [-1, 1.7519], where the map is monotone, such as 1.29")
        self.s = s

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (u - self.s * ((u * (math.pi / 2)).sin().square() - u)).clamp(0, 1)


class Speed(Stratified):
    """p(t) = k/(1 + tau (k - 1)) up to tau and 1/(1 + tau (k - 1)) beyond it, where x_t is nearly noise and hardly
    changes: SpeeD's asymmetric sampling (Wang et al. 2024, arXiv:2405.17403, section 3.2).

    The authors' code puts tau where sigma_t grows by less than 1e-4 per step of 1,000, which is t = 0.64 for linear
    betas (0.7 in the paper) and 0.96 for the cosine schedule, with k = 5; here tau is given, whatever the schedule.
    The method's second half, weights on the loss where levels change fast, is not part of this.

    Args:
        tau: where suppression begins, in (0, 1).
        k: by how much the times beyond it are rarer, >= 1.
    """

    edges: Tensor
    p: Tensor

    def __init__(self, tau: float = 0.7, k: float = 5.0, steps: int | None = None):
        super().__init__(steps)
        if not 0 < tau < 1:
            raise ValueError(f"tau={tau}: need a number in (0, 1), such as 0.7")
        if not 1 <= k < math.inf:
            raise ValueError(f"k={k}: need a number >= 1, such as 5")
        self.register_buffer("edges", torch.tensor([0, tau, 1], dtype=torch.float64), persistent=False)
        self.register_buffer("p", torch.tensor([k * tau, 1 - tau], dtype=torch.float64), persistent=False)

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return histogram_icdf(u, self.edges, self.p)


class FromCurve(Stratified):
    """p(t) = L(t) / integral of L, for a given L.

    Args:
        curve: a CSV with columns t and value, such a JSON file or its text, or a run (see ``Curve.load``); or a Curve.
        panel: of a run, which loss: eps, x_0 or v. They differ by factors of the signal-to-noise ratio.
        correct: weight losses by 1/p(t), so that the objective stays that of uniform t; L must be > 0 then.
    """

    def __init__(self, curve: Curve | str, panel: str = "eps", correct: bool = False, steps: int | None = None):
        super().__init__(steps)
        self.curve = curve if isinstance(curve, Curve) else Curve.load(curve, panel)
        if correct and not bool((self.curve.value > 0).all()):
            raise ValueError("correct=true: the curve is 0 somewhere, and a time that is never drawn has no weight")
        self.correct = correct

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.curve.inverse(u)

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        return self.curve.total / self.curve(t) if self.correct else super().weights(t, schedule)
