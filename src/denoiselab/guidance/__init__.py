"""Guidance: denoisers made of denoisers."""

from denoiselab.guidance.autoguidance import Autoguidance
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided
from denoiselab.guidance.cfg import CFG, Rescale, both, scale_from_w
from denoiselab.guidance.classifier import Classifier, KernelClassifier, KernelPosterior
from denoiselab.guidance.interval import Interval, Range
from denoiselab.guidance.replacement import Replacement
from denoiselab.guidance.threshold import DynamicThreshold

__all__ = [
    "CFG",
    "Autoguidance",
    "Classifier",
    "DenoiserLike",
    "DynamicThreshold",
    "Guidance",
    "Interval",
    "KernelClassifier",
    "KernelPosterior",
    "Range",
    "Replacement",
    "Rescale",
    "both",
    "outputs_of",
    "scale_from_w",
    "unguided",
]
