"""A loss weighting of one's own."""

from torch import Tensor

from denoiselab.weighting import Weighting


class PowerOfSNR(Weighting):
    """w_t = SNR^exponent: 0 is the plain MSE of x_0, 1 that of eps.

    Args:
        exponent: any number.
    """

    def __init__(self, exponent: float = 0.5):
        self.exponent = exponent
        self.formula = f"SNR^{exponent:g}"

    def weight(self, alpha_t: Tensor, sigma_t: Tensor, rate: Tensor) -> Tensor:
        return (alpha_t / sigma_t) ** (2 * self.exponent)
