"""Consistency functions: every point of a path of the probability-flow ODE is sent to where the path ends."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.schedule import LEAST_RATIO
from denoiselab.target import Target

SIGMA_MIN = 0.002
"""sigma/alpha at which a path counts as ended (Karras et al. 2022, arXiv:2206.00364, table 1)."""


class Consistency(Target):
    """f(x_t) = c_skip x_t/alpha_t + c_out y, with r = sigma_t/alpha_t, s_d = sigma_data and
    c_skip = s_d^2/((r - r_min)^2 + s_d^2), c_out = s_d (r - r_min)/sqrt(s_d^2 + r^2)
    (Song et al. 2023, arXiv:2303.01469, eq. 5 and appendix C, written for any alpha_t).

    Read as an estimate of x_0 it is one more linear target. What it is for is its end: at r_min and below,
    f(x_t) = x_t/alpha_t exactly, whatever the network says, which is the boundary condition of a consistency function.
    There y tells nothing of x_0, so its coefficients and its precision are held where r - r_min = 1e-4.

    Args:
        sigma_data: the root mean square of x_0, > 0.
        sigma_min: r_min, in units of sigma_t/alpha_t, > 0.

    >>> import torch
    >>> x, one = torch.tensor(3.0), torch.tensor(1.0)
    >>> Consistency().to_x_0(torch.tensor(99.0), x, one, torch.tensor(0.002))
    tensor(3.)
    """

    def __init__(self, sigma_data: float = 1.0, sigma_min: float = SIGMA_MIN):
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data}: need a number > 0")
        if not sigma_min > 0:
            raise ValueError(f"sigma_min={sigma_min}: need a number > 0, such as {SIGMA_MIN}")
        self.sigma_data, self.sigma_min = sigma_data, sigma_min
        self.snr_weight = f"(SNR + 1/{sigma_data:g}^2)/(1 - {sigma_min:g}*sqrt(SNR))^2"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        away, norm, scale = self._parts(alpha_t, sigma_t, LEAST_RATIO)
        ends = away**2 + (self.sigma_data * alpha_t) ** 2
        return away * norm / (scale * ends), -scale * alpha_t * sigma_t * norm / (away * ends)

    def to_x_0(self, y: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """f(x_t)."""
        away, norm, scale = self._parts(alpha_t, sigma_t)
        skip = scale**2 * alpha_t / (away**2 + (scale * alpha_t) ** 2)  # c_skip/alpha_t
        return torch.addcmul(skip * x_t, scale * away / norm, y)

    def to_eps(self, y: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """(x_t - alpha_t f(x_t))/sigma_t; 0 from r_min down."""
        return (x_t - alpha_t * self.to_x_0(y, x_t, alpha_t, sigma_t)) / sigma_t

    def precision(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """1/c_out^2; 0 from r_min down, where the answer of a network changes nothing."""
        away, norm, scale = self._parts(alpha_t, sigma_t, LEAST_RATIO)
        free = sigma_t > self.sigma_min * alpha_t
        return torch.where(free, (norm / (scale * away)) ** 2, 0.0)

    def _parts(self, alpha_t: Tensor, sigma_t: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor, float]:
        """alpha_t (r - r_min), at least alpha_t times least; alpha_t sqrt(s_d^2 + r^2); s_d."""
        away = torch.maximum(sigma_t - self.sigma_min * alpha_t, least * alpha_t)
        return away, (alpha_t**2 * self.sigma_data**2 + sigma_t**2).sqrt(), self.sigma_data
