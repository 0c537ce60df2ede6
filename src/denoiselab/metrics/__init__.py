"""What is measured on samples and on models."""

from denoiselab.metrics.accuracy import ClassAccuracy
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DigitsNet
from denoiselab.metrics.frechet import FrechetDistance
from denoiselab.metrics.mmd import KernelMMD, ModeCoverage
from denoiselab.metrics.neighbours import NearestTraining
from denoiselab.metrics.pairs import Fidelity
from denoiselab.metrics.precision_recall import PrecisionRecall
from denoiselab.metrics.super_resolution import Enlargement

__all__ = [
    "ClassAccuracy",
    "DigitsNet",
    "Enlargement",
    "Fidelity",
    "FrechetDistance",
    "KernelMMD",
    "Measurement",
    "Metric",
    "ModeCoverage",
    "NearestTraining",
    "PrecisionRecall",
]
