"""A training distribution of t of one's own."""

from torch import Tensor

from denoiselab.schedule import Schedule
from denoiselab.timesteps import Stratified


class Skewed(Stratified):
    """t = u^exponent, so p(t) = t^(1/exponent - 1)/exponent; stratified over the global batch.

    Args:
        exponent: > 0; below 1 favours noisy levels, above 1 clean ones.
    """

    def __init__(self, exponent: float = 0.5):
        super().__init__()
        if not exponent > 0:
            raise ValueError(f"exponent={exponent}: need a number > 0")
        self.exponent = exponent

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u**self.exponent
