"""Where the runs of a sweep are made: on this machine, by a cluster's scheduler, on a Ray cluster."""

from denoiselab.launcher.base import Launcher, Source, Task
from denoiselab.launcher.local import Local

__all__ = ["Launcher", "Local", "Source", "Task"]
