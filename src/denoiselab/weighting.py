"""Loss weightings, all on one axis: a weight on the squared x_0 error as a function of the noise level.

Because every weighting lives in that one space, the same name is the same ablation whatever the network predicts.
A weighting is its one method ``weight(alpha_t, sigma_t, rate)``. Papers write theirs for the target that they use; a
weight on the squared error of a target is multiplied by that target's precision to stand here: by SNR for eps, by
SNR + 1 for v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from denoiselab.buffers import ExactBuffers
from denoiselab.gaussian import beta_share, log_snr_before
from denoiselab.schedule import Schedule, log_snr
from denoiselab.target import Flow, Target


class Weighting:
    """w_t, applied to |x_0_hat - x_0|^2."""

    formula: str
    """The effective weight on the squared x_0 error, for people to read."""

    added: str = ""
    """What ``apply`` adds to the weighted error, for people to read."""

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        """w_t at each level.

        Args:
            alpha_t, sigma_t: the level, any shape.
            rate: -d log_snr/dt there, same shape (the likelihood's weighting needs it).
        """
        raise NotImplementedError

    def apply(self, error: Tensor, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        """w_t x error, for the squared x_0 error of shape (B,)."""
        return self.weight(alpha_t, sigma_t, rate) * error


def snr(alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """alpha_t^2 / sigma_t^2."""
    return (alpha_t / sigma_t) ** 2


class Unit(Weighting):
    """w_t = precision of the run's own target: the plain MSE of what the network predicts.

    SNR for eps (DDPM's "simple" loss, Ho et al. 2020, arXiv:2006.11239, eq. 14), SNR + 1 for v, 1 for x0,
    EDM's lambda for edm, flow matching's weight for flow.
    """

    def __init__(self, target: Target):
        self.target = target
        self.formula = target.snr_weight

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return self.target.precision(alpha_t, sigma_t)


class SNR(Weighting):
    """w_t = SNR: the plain MSE of eps, for every target (Ho et al. 2020, arXiv:2006.11239, eq. 14)."""

    formula = "SNR"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return snr(alpha_t, sigma_t)


class SNRPlusOne(Weighting):
    """w_t = SNR + 1: the plain MSE of v, for every target (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""

    formula = "SNR + 1"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return snr(alpha_t, sigma_t) + 1


class TruncatedSNR(Weighting):
    """w_t = max(SNR, 1): never below the plain MSE of x_0 (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""

    formula = "max(SNR, 1)"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return snr(alpha_t, sigma_t).clamp_min(1)


class InverseVariance(Weighting):
    """w_t = 1/s^2 = (sqrt(SNR) + 1)^2, s = sigma_t/(alpha_t + sigma_t): the noise's share on the straight path.

    That is flow matching's own MSE, for every target (Esser et al. 2024, arXiv:2403.03206, section 2).
    """

    formula = "(sqrt(SNR) + 1)^2"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return (alpha_t / sigma_t + 1) ** 2


class EDM(Weighting):
    """w_t = (s^2 + sigma_data^2)/(s sigma_data)^2 = SNR + 1/sigma_data^2, s = sigma_t/alpha_t (Karras et al. 2022,
    arXiv:2206.00364, table 1): the plain MSE of EDM's F, for every target.

    Args:
        sigma_data: the root mean square of x_0, > 0.
    """

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = positive("sigma_data", sigma_data, 0.5)
        self.formula = f"SNR + 1/{sigma_data:g}^2"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return snr(alpha_t, sigma_t) + 1 / self.sigma_data**2


class MinSNR(Weighting):
    """w_t = min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, section 3.4; eq. for x_0).

    In eps space this reads min(SNR, gamma)/SNR and in v space min(SNR, gamma)/(SNR + 1); the forms
    min(SNR + 1, gamma)/(SNR + 1) found in public code are another weighting.

    Args:
        gamma: the cap, > 0.
    """

    def __init__(self, gamma: float = 5.0):
        self.gamma = positive("gamma", gamma, 5)
        self.formula = f"min(SNR, {gamma:g})"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return snr(alpha_t, sigma_t).clamp_max(self.gamma)


class SoftMinSNR(Weighting):
    """w_t = SNR gamma/(SNR + gamma): half the harmonic mean of SNR and gamma, a smooth min(SNR, gamma) (Crowson et
    al. 2024, arXiv:2401.11605). With s = sigma_t/alpha_t it reads 1/(s^2 + 1/gamma); public code that writes
    1/(s^2 + sigma_data^2) has gamma = 1/sigma_data^2.

    Args:
        gamma: the limit at low noise, > 0.
    """

    def __init__(self, gamma: float = 4.0):
        self.gamma = positive("gamma", gamma, 4)
        self.formula = f"SNR * {gamma:g}/(SNR + {gamma:g})"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return 1 / ((sigma_t / alpha_t) ** 2 + 1 / self.gamma)


class P2(Weighting):
    """w_t = SNR/(k + SNR)^gamma: the squared error of eps divided by (k + SNR)^gamma, which takes weight from low
    noise (Choi et al. 2022, arXiv:2204.00227, section 3).

    Args:
        k: > 0, bounds the weight at high noise.
        gamma: >= 0; 0 is L_simple.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0):
        self.k, self.gamma = positive("k", k, 1), gamma
        if not gamma >= 0:
            raise ValueError(f"gamma={gamma}: need a number >= 0, such as 1")
        self.formula = f"SNR/({k:g} + SNR)^{gamma:g}"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        ratio = snr(alpha_t, sigma_t)
        return ratio / (self.k + ratio) ** self.gamma


class VLB(Weighting):
    """w_t = SNR rate/2, rate = -d log_snr/dt: the variational bound in continuous time (Kingma et al. 2021,
    arXiv:2107.00630, eq. 17 and 18, for x_0).

    At uniform t its integral is (1/2) int SNR d log_snr, or (1/2) int |eps error|^2 d log_snr, whatever the schedule
    between its ends. It is the bound's diffusion term; the terms of the prior and of the decoder are not in it.
    """

    formula = "SNR * rate/2"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return snr(alpha_t, sigma_t) * rate / 2


class VLBBeta(Weighting):
    """w_t = T (SNR_t + 1)(SNR_s - SNR_t)/(2 (SNR_s + 1)): DDPM's bound on a table of T points with the reverse
    variance beta, times T, so that its mean over points is the bound's sum.

    That is beta^2/(2 sigma^2 alpha (1 - abar)) with sigma^2 = beta on the squared error of eps (Ho et al. 2020,
    arXiv:2006.11239, eq. 12), s being the point before t. At the first point it is 1/(2 alpha_1) on eps.

    Args:
        schedule: a table (one with points).
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.points = schedule, points_of(schedule)
        self.formula = f"{self.points}/2 * (SNR + 1) * (SNR_s - SNR)/(SNR_s + 1)"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        now, before = neighbours(self.schedule, self.points, alpha_t, sigma_t)
        return (self.points / 2 * (1 + now.exp()) * beta_share(now, before)).to(alpha_t.dtype)


class VLBBetaTilde(Weighting):
    """w_t = T (SNR_s - SNR_t)/2: DDPM's bound on a table of T points with the posterior's variance beta_tilde, times
    T, so that its mean over points is the bound's sum (Ho et al. 2020, arXiv:2006.11239, eq. 12; Kingma et al. 2021,
    arXiv:2107.00630, eq. 13).

    s is the point before t. At the first point it is 0: that term is the decoder's, not a weighted error.

    Args:
        schedule: a table (one with points).
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.points = schedule, points_of(schedule)
        self.formula = f"{self.points}/2 * (SNR_s - SNR)"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        now, before = neighbours(self.schedule, self.points, alpha_t, sigma_t)
        weight = self.points / 2 * now.exp() * (before - now).expm1()
        return weight.masked_fill(before == math.inf, 0).to(alpha_t.dtype)


class Sigmoid(Weighting):
    """w_t = SNR rate/2 sigmoid(b - log_snr): the bound's eps error per d log_snr, weighted by a function that falls
    with the SNR, so that it is the bound of noised data (Kingma and Gao 2023, arXiv:2303.00848, section 5).

    Args:
        b: the log-SNR, in nats, above which the weight falls.
    """

    def __init__(self, b: float = 2.0):
        self.b = b
        self.formula = f"SNR * rate/2 * sigmoid({b:g} - log_snr)"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        # SNR sigmoid(b - log_snr) = 1/(1/SNR + e^-b)
        return rate / 2 / ((sigma_t / alpha_t) ** 2 + math.exp(-self.b))


class CosMap(Weighting):
    """w_t = 2/(pi (1 - 2 s + 2 s^2)) / s^2, s = sigma_t/(alpha_t + sigma_t): flow's squared error weighted as the
    straight path's times would be drawn to have the log-SNRs of the cosine schedule (Esser et al. 2024,
    arXiv:2403.03206, section 3.1, "CosMap").
    """

    formula = "2/pi * (sqrt(SNR) + 1)^4/(SNR + 1)"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        s = sigma_t / (alpha_t + sigma_t)
        return 2 / (math.pi * (1 - 2 * s + 2 * s**2)) * Flow().precision(alpha_t, sigma_t)


class Uncertainty(ExactBuffers, Weighting):
    """w_t |x_0_hat - x_0|^2 e^-u + u with a learned u(log_snr): where u is at its optimum, the expected weighted error
    is e^u, and every level contributes alike (Karras et al. 2023, arXiv:2312.02696; Kendall et al. 2018,
    arXiv:1705.07115).

    u is linear in random Fourier features of c_noise and starts at 0. Its weights train with the network's, stay
    float32 under every precision, and are forgotten after training.

    Args:
        sigma_data: the root mean square of x_0, > 0.
        channels: number of features, >= 1.
        base: w_t; EDM's if none is given.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, sigma_data: float = 1.0, channels: int = 128, base: Weighting | None = None):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels}: need at least 1")
        self.base = EDM(sigma_data) if base is None else base
        self.formula, self.added = f"({self.base.formula}) * exp(-u)", " + u"
        g = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=g))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=g))
        self.readout = nn.Parameter(torch.zeros(channels))

    def u(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The log of the expected weighted error, shaped like the level."""
        c_noise = log_snr(alpha_t, sigma_t) / -8
        features = math.sqrt(2) * (c_noise[..., None] * self.frequencies + self.phases).cos()
        return (features * self.readout).sum(-1) / math.sqrt(len(self.readout))

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return self.base.weight(alpha_t, sigma_t, rate) * (-self.u(alpha_t, sigma_t)).exp()

    def apply(self, error: Tensor, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        u = self.u(alpha_t, sigma_t)
        return self.base.weight(alpha_t, sigma_t, rate) * error * (-u).exp() + u


def neighbours(schedule: Schedule, points: int, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
    """The log-SNR of a level and of the point before it, in float64."""
    now = log_snr(alpha_t.double(), sigma_t.double())
    return now, log_snr_before(schedule, schedule.inverse(now), points)


def points_of(schedule: Schedule) -> int:
    """T of a table.

    Raises:
        ValueError: the schedule has no points.
    """
    if schedule.points is None:
        raise ValueError(
            f"schedule={type(schedule).__name__}: need a table of points, such as schedule=linear; or use weighting=vlb"
        )
    return schedule.points


def positive(name: str, value: float, example: float) -> float:
    """The value, if it is > 0 and of a size that can be squared.

    Raises:
        ValueError: in one line.
    """
    if not 1e-100 <= value <= 1e100:  # so that its square and one over it are numbers too
        raise ValueError(f"{name}={value}: need a number > 0, such as {example:g}, between 1e-100 and 1e100")
    return value
