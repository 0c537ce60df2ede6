"""What is measured on samples and on models."""

from denoiselab.metrics.accuracy import ClassAccuracy
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.clip_score import Clip, ClipScore
from denoiselab.metrics.coverage import ClusterCoverage
from denoiselab.metrics.features import DigitsFeatures, DigitsNet, Features
from denoiselab.metrics.frechet import FrechetDistance
from denoiselab.metrics.inception_score import InceptionScore
from denoiselab.metrics.infinity import FrechetInfinity
from denoiselab.metrics.kernel import KernelDistance
from denoiselab.metrics.lpips import LPIPS
from denoiselab.metrics.mmd import KernelMMD, ModeCoverage
from denoiselab.metrics.neighbours import NearestTraining
from denoiselab.metrics.networks import Inception, Torchvision
from denoiselab.metrics.pairs import Fidelity
from denoiselab.metrics.precision_recall import DensityCoverage, PrecisionRecall
from denoiselab.metrics.super_resolution import Enlargement

__all__ = [
    "LPIPS",
    "ClassAccuracy",
    "Clip",
    "ClipScore",
    "ClusterCoverage",
    "DensityCoverage",
    "DigitsFeatures",
    "DigitsNet",
    "Enlargement",
    "Features",
    "Fidelity",
    "FrechetDistance",
    "FrechetInfinity",
    "Inception",
    "InceptionScore",
    "KernelDistance",
    "KernelMMD",
    "Measurement",
    "Metric",
    "ModeCoverage",
    "NearestTraining",
    "PrecisionRecall",
    "Torchvision",
]
