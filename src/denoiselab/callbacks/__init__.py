"""Callbacks: everything that happens beside the training step."""

from denoiselab.callbacks.base import Evaluation, Periodic
from denoiselab.callbacks.buckets import LossBuckets
from denoiselab.callbacks.checkpoints import Checkpoints
from denoiselab.callbacks.divergence import Divergence
from denoiselab.callbacks.early_stopping import EarlyStopping
from denoiselab.callbacks.inspection import Inspection
from denoiselab.callbacks.metrics import TrainingMetrics
from denoiselab.callbacks.progress import ProgressBar
from denoiselab.callbacks.ranks import RankWatch
from denoiselab.callbacks.reconstructions import Reconstructions
from denoiselab.callbacks.samples import SampleGrid
from denoiselab.callbacks.throughput import Throughput

__all__ = [
    "Checkpoints",
    "Divergence",
    "EarlyStopping",
    "Evaluation",
    "Inspection",
    "LossBuckets",
    "Periodic",
    "ProgressBar",
    "RankWatch",
    "Reconstructions",
    "SampleGrid",
    "Throughput",
    "TrainingMetrics",
]
