"""Where a run's numbers and pictures go: RUN/metrics.jsonl always, and dashboards that are drawn from it."""

from denoiselab.loggers.base import Dashboard, evaluated, finishing
from denoiselab.loggers.json_lines import JsonLines
from denoiselab.loggers.tensorboard import TensorBoard
from denoiselab.loggers.wandb import Wandb

__all__ = ["Dashboard", "JsonLines", "TensorBoard", "Wandb", "evaluated", "finishing"]
