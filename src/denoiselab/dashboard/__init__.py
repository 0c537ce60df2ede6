"""What other pages are made of: reports on wandb's server, and sweeps that it hands out."""

from denoiselab.dashboard.report import Published, publish, specification
from denoiselab.dashboard.sweep_file import Asked, commands, sweep_file

__all__ = ["Asked", "Published", "commands", "publish", "specification", "sweep_file"]
