"""Where the runs of a sweep are made: on this machine, by a cluster's scheduler, on a Ray cluster."""

from denoiselab.launcher.base import Launcher, Source, Task
from denoiselab.launcher.local import Local
from denoiselab.launcher.ray import Ray
from denoiselab.launcher.slurm import Slurm

__all__ = ["Launcher", "Local", "Ray", "Slurm", "Source", "Task"]
