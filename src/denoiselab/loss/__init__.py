"""Training losses, per sample."""

from denoiselab.loss.base import Loss
from denoiselab.loss.weighted import WeightedLoss

__all__ = ["Loss", "WeightedLoss"]
