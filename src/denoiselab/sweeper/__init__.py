"""How the jobs of a sweep are chosen: every combination, or one after another by what the ones before gave."""

from denoiselab.sweeper.base import Job, Sweeper
from denoiselab.sweeper.grid import Grid
from denoiselab.sweeper.optuna import Optuna

__all__ = ["Grid", "Job", "Optuna", "Sweeper"]
