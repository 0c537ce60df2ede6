"""Training distributions of t."""

from denoiselab.timesteps.base import Place, Timesteps
from denoiselab.timesteps.density import FromCurve, LogitNormal, LogNormal, Mode, Speed
from denoiselab.timesteps.importance import Importance, MeanImportance
from denoiselab.timesteps.slots import Curriculum, Slot, Slots
from denoiselab.timesteps.uniform import Antithetic, Discrete, LowDiscrepancy, Stratified, Uniform

__all__ = [
    "Antithetic",
    "Curriculum",
    "Discrete",
    "FromCurve",
    "Importance",
    "LogNormal",
    "LogitNormal",
    "LowDiscrepancy",
    "MeanImportance",
    "Mode",
    "Place",
    "Slot",
    "Slots",
    "Speed",
    "Stratified",
    "Timesteps",
    "Uniform",
]
