"""Loss weightings, all on one axis: a weight on the squared x_0 error as a function of the noise level.

Because every weighting lives in that one space, the same name is the same ablation whatever the network predicts.
A weighting is its one method ``weight(alpha_t, sigma_t, rate)``.
"""

from __future__ import annotations

from torch import Tensor

from denoiselab.target import Target


class Weighting:
    """w_t, applied to |x_0_hat - x_0|^2."""

    formula: str
    """The effective weight on the squared x_0 error, for people to read."""

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


class Unit(Weighting):
    """w_t = precision of the run's own target: the plain MSE of what the network predicts.

    SNR for eps (DDPM's "simple" loss, Ho et al. 2020, arXiv:2006.11239, eq. 14), SNR + 1 for v, 1 for x0.
    """

    def __init__(self, target: Target):
        self.target = target
        self.formula = target.snr_weight

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return self.target.precision(alpha_t, sigma_t)


class MinSNR(Weighting):
    """w_t = min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, section 3.4; eq. for x_0).

    In eps space this reads min(SNR, gamma)/SNR and in v space min(SNR, gamma)/(SNR + 1); the forms
    min(SNR + 1, gamma)/(SNR + 1) found in public code are another weighting.

    Args:
        gamma: the cap, > 0.
    """

    def __init__(self, gamma: float = 5.0):
        if not gamma > 0:
            raise ValueError(f"gamma={gamma}: need a number > 0, such as 5")
        self.gamma = gamma
        self.formula = f"min(SNR, {gamma:g})"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return ((alpha_t / sigma_t) ** 2).clamp_max(self.gamma)
