"""Training distributions of t."""

from denoiselab.timesteps.base import Place, Timesteps
from denoiselab.timesteps.uniform import Stratified, Uniform

__all__ = ["Place", "Stratified", "Timesteps", "Uniform"]
