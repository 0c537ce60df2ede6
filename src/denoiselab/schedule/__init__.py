"""Noise schedules: alpha_t and sigma_t as functions of t."""

from denoiselab.schedule.base import LEAST_RATIO, RATIO, Level, Schedule, log_snr
from denoiselab.schedule.tables import Cosine, Discrete, Linear

__all__ = ["LEAST_RATIO", "RATIO", "Cosine", "Discrete", "Level", "Linear", "Schedule", "log_snr"]
