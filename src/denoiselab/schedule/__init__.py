"""Noise schedules: alpha_t and sigma_t as functions of t."""

from denoiselab.schedule.adaptive import Adaptive
from denoiselab.schedule.base import LEAST_RATIO, RATIO, Level, Schedule, log_snr
from denoiselab.schedule.continuous import EDM, GVP, VE, VP, Flow
from denoiselab.schedule.tables import Cosine, Discrete, Linear, ScaledLinear, Sigmoid, SigmoidBeta
from denoiselab.schedule.zero_terminal import ZeroTerminal

__all__ = [
    "EDM",
    "GVP",
    "LEAST_RATIO",
    "RATIO",
    "VE",
    "VP",
    "Adaptive",
    "Cosine",
    "Discrete",
    "Flow",
    "Level",
    "Linear",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "SigmoidBeta",
    "ZeroTerminal",
    "log_snr",
]
