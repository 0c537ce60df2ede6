"""Training losses, per sample."""

from denoiselab.loss.autoencoder import Reconstruction
from denoiselab.loss.base import Loss
from denoiselab.loss.consistency import (
    Averaged,
    ConsistencyDistillation,
    ConsistencyTraining,
    Doubling,
    Fixed,
    Online,
    PseudoHuber,
    SquaredError,
    SquareRoot,
)
from denoiselab.loss.distillation import Progressive
from denoiselab.loss.hybrid import Hybrid
from denoiselab.loss.learned import LearnedHybrid
from denoiselab.loss.mixed import Common, Mixed, Own, SoftMin, Standardised, ThreeHeads, Uncertainty, Winner
from denoiselab.loss.weighted import WeightedLoss

__all__ = [
    "Averaged",
    "Common",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "Doubling",
    "Fixed",
    "Hybrid",
    "LearnedHybrid",
    "Loss",
    "Mixed",
    "Online",
    "Own",
    "Progressive",
    "PseudoHuber",
    "Reconstruction",
    "SoftMin",
    "SquareRoot",
    "SquaredError",
    "Standardised",
    "ThreeHeads",
    "Uncertainty",
    "WeightedLoss",
    "Winner",
]
