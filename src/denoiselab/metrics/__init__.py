"""What is measured on samples and on models."""

from denoiselab.metrics.accuracy import ClassAccuracy
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DigitsNet
from denoiselab.metrics.frechet import FrechetDistance
from denoiselab.metrics.mmd import KernelMMD, ModeCoverage
from denoiselab.metrics.neighbours import NearestTraining
from denoiselab.metrics.precision_recall import PrecisionRecall

__all__ = [
    "ClassAccuracy",
    "DigitsNet",
    "FrechetDistance",
    "KernelMMD",
    "Measurement",
    "Metric",
    "ModeCoverage",
    "NearestTraining",
    "PrecisionRecall",
]
