"""A prediction target of one's own."""

from torch import Tensor, ones_like

from denoiselab.target import Target


class Difference(Target):
    """y = eps - x_0. Its MSE weighs the x_0 error by ((alpha_t + sigma_t)/sigma_t)^2."""

    snr_weight = "(sqrt(SNR) + 1)^2"

    def coefficients(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        return -ones_like(alpha_t), ones_like(alpha_t)
