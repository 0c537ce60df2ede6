"""Prediction targets: what the network regresses, ``y = a_t x_0 + b_t eps``.

A target is its one method ``coefficients(alpha_t, sigma_t) -> (a_t, b_t)``, homogeneous of degree 0 in
(alpha, sigma); the estimate of x_0, of eps, and the exchange rate between their squared errors follow.
"""

from __future__ import annotations

from torch import Tensor, ones_like, zeros_like


class Target:
    """y = a_t x_0 + b_t eps."""

    snr_weight: str
    """The weight that the plain MSE of this target puts on the squared x_0 error, as a formula."""

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __call__(self, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The regression target y."""
        a_t, b_t = self.coefficients(alpha_t, sigma_t)
        return a_t * x_0 + b_t * eps

    def to_x_0(self, y: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """x_0 = (b_t x_t - sigma_t y) / (alpha_t b_t - sigma_t a_t): the two linear equations solved for x_0."""
        a_t, b_t = self.coefficients(alpha_t, sigma_t)
        d_t = alpha_t * b_t - sigma_t * a_t
        return (b_t / d_t * x_t).addcmul_(sigma_t / -d_t, y)

    def to_eps(self, y: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """eps = (alpha_t y - a_t x_t) / (alpha_t b_t - sigma_t a_t)."""
        a_t, b_t = self.coefficients(alpha_t, sigma_t)
        d_t = alpha_t * b_t - sigma_t * a_t
        return (alpha_t / d_t * y).addcmul_(a_t / -d_t, x_t)

    def to_score(self, y: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The gradient of log p(x_t): -eps/sigma_t (Song et al. 2021, arXiv:2011.13456)."""
        return -self.to_eps(y, x_t, alpha_t, sigma_t) / sigma_t

    def precision(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """((alpha_t b_t - sigma_t a_t) / sigma_t)^2, so that |y_hat - y|^2 = precision |x_0_hat - x_0|^2."""
        a_t, b_t = self.coefficients(alpha_t, sigma_t)
        return ((alpha_t * b_t - sigma_t * a_t) / sigma_t) ** 2


class X0(Target):
    """y = x_0: the denoised sample itself.

    >>> import torch
    >>> X0().coefficients(torch.tensor(0.8), torch.tensor(0.6))
    (tensor(1.), tensor(0.))
    """

    snr_weight = "1"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        return ones_like(alpha_t), zeros_like(alpha_t)


class Eps(Target):
    """y = eps: the noise (Ho et al. 2020, arXiv:2006.11239, eq. 14). Its MSE weighs the x_0 error by the SNR.

    >>> import torch
    >>> Eps().precision(torch.tensor(0.8), torch.tensor(0.6))       # SNR = 0.64 / 0.36
    tensor(1.7778)
    """

    snr_weight = "SNR"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        return zeros_like(alpha_t), ones_like(alpha_t)


class V(Target):
    """y = (alpha_t eps - sigma_t x_0) / sqrt(alpha_t^2 + sigma_t^2): the velocity (Salimans and Ho 2022,
    arXiv:2202.00512, section 4 and appendix D). Its MSE weighs the x_0 error by SNR + 1, and to_x_0 divides by
    nothing that vanishes.

    >>> import torch
    >>> V().precision(torch.tensor(0.8), torch.tensor(0.6))         # SNR + 1
    tensor(2.7778)
    """

    snr_weight = "SNR + 1"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        norm = (alpha_t**2 + sigma_t**2).sqrt()
        return -sigma_t / norm, alpha_t / norm


class Flow(Target):
    """y = eps - x_0: the velocity dx_t/dt of the straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2022,
    arXiv:2209.03003, eq. 1, whose time runs the other way; Esser et al. 2024, arXiv:2403.03206). Any schedule can
    be used. Its MSE weighs the x_0 error by ((alpha_t + sigma_t)/sigma_t)^2, which on the straight path is
    1/sigma_t^2.

    >>> import torch
    >>> Flow().precision(torch.tensor(0.8), torch.tensor(0.2))      # 1 / 0.2^2
    tensor(25.)
    """

    snr_weight = "(sqrt(SNR) + 1)^2"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        return -ones_like(alpha_t), ones_like(alpha_t)


class EDM(Target):
    """y = (sigma_t/s_d x_0 - alpha_t s_d eps) / sqrt(alpha_t^2 s_d^2 + sigma_t^2), s_d = sigma_data: what EDM's
    network F regresses, of unit mean square at every level and uncorrelated with x_t (Karras et al. 2022,
    arXiv:2206.00364, eq. 8 and table 1, written for any alpha_t). Its MSE weighs the x_0 error by
    SNR + 1/sigma_data^2, EDM's lambda. With sigma_data = 1 it is -v.

    Args:
        sigma_data: the root mean square of x_0, > 0.

    >>> import torch
    >>> EDM(sigma_data=0.5).precision(torch.tensor(0.8), torch.tensor(0.6))     # SNR + 4
    tensor(5.7778)
    """

    def __init__(self, sigma_data: float = 1.0):
        if not 0 < sigma_data < 1e100:
            raise ValueError(f"sigma_data={sigma_data}: need a number > 0 whose square is finite")
        self.sigma_data = sigma_data
        self.snr_weight = f"SNR + 1/{sigma_data:g}^2"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        norm = (alpha_t**2 * self.sigma_data**2 + sigma_t**2).sqrt()
        return sigma_t / (self.sigma_data * norm), -alpha_t * self.sigma_data / norm
