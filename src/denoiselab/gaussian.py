"""The Gaussians of one reverse step: divergences between them, and the step that a table takes.

Going from a point t of a table of T levels to the point s before it, where alpha^2 + sigma^2 = 1, in terms of the two
log-SNRs alone (h = log_snr_s - log_snr_t > 0):

    variance of q(x_s | x_t)        beta = sigma_t^2 (1 - e^-h)
    variance of q(x_s | x_t, x_0)   beta_tilde = beta sigma_s^2 / sigma_t^2
    (d mean / d x_0)^2 / beta_tilde = SNR_s - SNR_t
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.schedule import Schedule


def gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) = (log v_p/v_q + v_q/v_p - 1 + (m_q - m_p)^2/v_p)/2 per value, in nats; shapes broadcast.

    >>> zero = torch.zeros(())
    >>> gaussian_kl(torch.tensor(2.0), zero, zero, zero)
    tensor(2.)
    """
    d = log_variance_q - log_variance_p
    return (d.expm1() - d + (mean_q - mean_p) ** 2 * (-log_variance_p).exp()) / 2


def gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x; mean, v) = ((x - mean)^2/v + log 2 pi v)/2 per value, in nats; shapes broadcast."""
    return ((x - mean) ** 2 * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2


def log_ndtr(x: Tensor) -> Tensor:
    """The log of the standard normal distribution function: torch's, with a gradient that holds in the left tail.

    In float32 that of torch.special.log_ndtr is off by 6 times at -1e4, and 0 at -1e6.

    >>> x = torch.tensor([-1e4, -1.0, 1.0], requires_grad=True)
    >>> log_ndtr(x).sum().backward()
    >>> x.grad
    tensor([1.0000e+04, 1.5251e+00, 2.8760e-01])
    """
    left = x.clamp_max(-1)
    tail = (torch.special.erfcx(left * -math.sqrt(0.5)) / 2).log() - left**2 / 2
    return torch.where(x < -1, tail, torch.special.log_ndtr(x.clamp_min(-1)))


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor, bins: int = 256) -> Tensor:
    """-log of the mass that N(mean, v) gives to the bin around x, per value, in nats (Ho et al. 2020,
    arXiv:2006.11239, eq. 13, with the exact distribution function).

    The bins are centred at ``bins`` equally spaced values from -1 to 1; the first reaches to -infinity and the last
    to infinity, so that their masses add up to 1.

    Args:
        x: values of those levels.
        mean, log_variance: of the Gaussian; shapes broadcast against x.
        bins: number of levels, >= 2.

    Raises:
        ValueError: fewer bins.

    >>> levels = torch.linspace(-1, 1, 17).double()
    >>> mass = (-discretised_gaussian_nll(levels, torch.tensor(0.3), torch.tensor(-4.0), bins=17)).exp()
    >>> print(f"{mass.sum():.12f}")
    1.000000000000
    """
    if bins < 2:
        raise ValueError(f"bins={bins}: need at least 2")
    half = 1 / (bins - 1)
    precision = (-log_variance / 2).exp()
    lower, upper = (x - half - mean) * precision, (x + half - mean) * precision
    # Both ends in the left tail, where distribution functions are not rounded to 1.
    right = lower + upper > 0
    a, b = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_a, log_b = log_ndtr(a), log_ndtr(b)
    between = log_b + (-(log_a - log_b).expm1()).clamp_min(torch.finfo(x.dtype).tiny).log()
    below, above = log_ndtr(upper), log_ndtr(-lower)
    return -torch.where(x < half - 1, below, torch.where(x > 1 - half, above, between))


def point_before(schedule: Schedule, t: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """s = t - 1/(T - 1), the point before t, in float64; and whether t is the first point, before which lies the
    clean level (s is then t itself).

    Args:
        schedule: any.
        t: times of points; between points, the step to t has the same length.
        points: T >= 2, the schedule's own where it has one.

    Raises:
        ValueError: there are fewer points.
    """
    if points < 2:
        raise ValueError(f"points={points}: need at least 2, between which there is a step")
    step = 1 / (points - 1)
    t = t.double()
    return torch.minimum((t - step).clamp_min(schedule.earliest), t), t < step / 2


def log_snr_before(schedule: Schedule, t: Tensor, points: int) -> Tensor:
    """log_snr_s at the point s before t, in float64; infinite at the first point."""
    s, first = point_before(schedule, t, points)
    return schedule.log_snr(s).masked_fill(first, math.inf)


def beta_share(log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """(SNR_s - SNR_t)/(SNR_s + 1), which is 1 - sigma_s^2/sigma_t^2 where alpha^2 + sigma^2 = 1; 1 if s is clean."""
    return 1 - (-log_snr_s).sigmoid() / (-log_snr_t).sigmoid()
