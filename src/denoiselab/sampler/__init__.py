"""Samplers: from noise to data along any schedule."""

from denoiselab.sampler.base import Rung, Sampler, State
from denoiselab.sampler.ddim import DDIM, DDPM
from denoiselab.sampler.heun import Heun
from denoiselab.sampler.spacing import Karras, Leading, Linspace, LogSNR, Spacing, Trailing

__all__ = [
    "DDIM",
    "DDPM",
    "Heun",
    "Karras",
    "Leading",
    "Linspace",
    "LogSNR",
    "Rung",
    "Sampler",
    "Spacing",
    "State",
    "Trailing",
]
