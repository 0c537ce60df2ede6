"""Continuous-time schedules: alpha_t and sigma_t in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from denoiselab.schedule.base import Schedule


class VP(Schedule):
    """log alpha_t = -t^2 (beta_max - beta_min)/4 - t beta_min/2, sigma_t^2 = 1 - alpha_t^2: variance preserving (Song
    et al. 2021, arXiv:2011.13456, eq. 32 and 33), what Linear's table tends to as T grows. sigma_0 = 0.

    Args:
        beta_min: the rate of noise at t = 0, > 0.
        beta_max: at t = 1, > beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        super().__init__()
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min={beta_min}, beta_max={beta_max}: need 0 < beta_min < beta_max")
        self.beta_min, self.beta_max = beta_min, beta_max

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The root of the quadratic -2 log alpha_t = log(1 + 1/SNR)."""
        c = softplus(-log_snr.double())
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * c).sqrt()
        return (2 * c / (self.beta_min + root)).clamp_max(1)


class VE(Schedule):
    """alpha_t = 1, sigma_t = sigma_min (sigma_max/sigma_min)^t: variance exploding (Song et al. 2021,
    arXiv:2011.13456, eq. 30 and 31, whose t > 0 leaves out the jump from sigma_0 = 0). Even in log-SNR.

    Args:
        sigma_min: > 0; the paper's 0.01 is for data in [0, 1].
        sigma_max: > sigma_min; about the largest distance between two samples (Song and Ermon 2020,
            arXiv:2006.09011, section 3), the paper's 50 for CIFAR-10.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        super().__init__()
        self.sigma_min, self.sigma_max = ordered(sigma_min, sigma_max)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def inverse(self, log_snr: Tensor) -> Tensor:
        log_sigma = -log_snr.double() / 2 - math.log(self.sigma_min)
        return (log_sigma / math.log(self.sigma_max / self.sigma_min)).clamp(0, 1)


class EDM(Schedule):
    """alpha_t = 1, sigma_t = (t sigma_max^(1/rho) + (1 - t) sigma_min^(1/rho))^rho (Karras et al. 2022,
    arXiv:2206.00364, eq. 5 with i/(N - 1) = 1 - t).

    The paper trains with log sigma normal, which is a distribution of times on this or any schedule.

    Args:
        sigma_min: > 0.
        sigma_max: > sigma_min.
        rho: > 0; larger spends more of t near the clean end.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        super().__init__()
        self.sigma_min, self.sigma_max = ordered(sigma_min, sigma_max)
        if not rho > 0:
            raise ValueError(f"rho={rho}: need a number > 0, such as 7")
        self.rho = rho

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        least, most = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (t * most + (1 - t) * least) ** self.rho

    def inverse(self, log_snr: Tensor) -> Tensor:
        least, most = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (((log_snr.double() / (-2 * self.rho)).exp() - least) / (most - least)).clamp(0, 1)


class Flow(Schedule):
    """alpha_t = 1 - u, sigma_t = u, u = shift t / (1 + (shift - 1) t): straight lines from data to noise (rectified
    flow, Liu et al. 2022, arXiv:2209.03003, eq. 1; flow matching, Lipman et al. 2022, arXiv:2210.02747).

    shift multiplies sigma_t/alpha_t, so that larger images are trained and sampled at more noise (Esser et al. 2024,
    arXiv:2403.03206, eq. 23: shift = sqrt(m/n) for m values instead of n). sigma_0 = 0 and alpha_1 = 0.

    Args:
        shift: > 0; 1 is no shift, 3 Stable Diffusion 3's at 1024 pixels.

    >>> Flow(shift=3.0)(torch.tensor([0.0, 0.5, 1.0]))
    Level(alpha=tensor([1.0000, 0.2500, 0.0000]), sigma=tensor([0.0000, 0.7500, 1.0000]))
    """

    def __init__(self, shift: float = 1.0):
        super().__init__()
        if not shift > 0:
            raise ValueError(f"shift={shift}: need a number > 0, such as 1 or 3")
        self.shift = shift

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        whole = 1 + (self.shift - 1) * t
        return (1 - t) / whole, self.shift * t / whole

    def inverse(self, log_snr: Tensor) -> Tensor:
        return (-log_snr.double() / 2 - math.log(self.shift)).sigmoid()


class GVP(Schedule):
    """alpha_t = cos(pi t/2), sigma_t = sin(pi t/2): variance preserving, on the circle at even speed (Albergo and
    Vanden-Eijnden 2022, arXiv:2209.15571; called GVP by Ma et al. 2024, arXiv:2401.08740). sigma_0 = 0, alpha_1 = 0."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin((1 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))

    def inverse(self, log_snr: Tensor) -> Tensor:
        return (-log_snr.double() / 2).exp().atan() * (2 / math.pi)


def ordered(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: need 0 < sigma_min < sigma_max")
    return sigma_min, sigma_max
