"""Looks at a model: each leaves a picture, the data behind it, and what it says of the model's health."""

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.best_target import BestTarget
from denoiselab.diagnostics.confusion import Confusion
from denoiselab.diagnostics.coverage import Coverage
from denoiselab.diagnostics.embedding import EmbeddingHealth
from denoiselab.diagnostics.forward import ForwardNoising
from denoiselab.diagnostics.gradient_noise import GradientNoise
from denoiselab.diagnostics.guidance import GuidanceGrid, GuidanceSweep
from denoiselab.diagnostics.influence import TimestepInfluence
from denoiselab.diagnostics.interference import Interference
from denoiselab.diagnostics.interpolation import Interpolation
from denoiselab.diagnostics.likelihood import Likelihood
from denoiselab.diagnostics.loss_by_t import LossByT
from denoiselab.diagnostics.loss_curve import LossCurve
from denoiselab.diagnostics.mismatch import ScheduleMismatch
from denoiselab.diagnostics.nearest import NearestNeighbours
from denoiselab.diagnostics.real_pairs import EncodedInterpolation, InvertedInterpolation
from denoiselab.diagnostics.replacement import GroundTruthReplacement
from denoiselab.diagnostics.score_field import ScoreField
from denoiselab.diagnostics.steps import QualityVersusSteps
from denoiselab.diagnostics.subject import Subject
from denoiselab.diagnostics.timestep_variance import TimestepVariance
from denoiselab.diagnostics.trajectories import Trajectories

__all__ = [
    "BestTarget",
    "Confusion",
    "Coverage",
    "Diagnostic",
    "EmbeddingHealth",
    "EncodedInterpolation",
    "Finding",
    "ForwardNoising",
    "GradientNoise",
    "GroundTruthReplacement",
    "GuidanceGrid",
    "GuidanceSweep",
    "Interference",
    "Interpolation",
    "InvertedInterpolation",
    "Likelihood",
    "LossByT",
    "LossCurve",
    "NearestNeighbours",
    "QualityVersusSteps",
    "ScheduleMismatch",
    "ScoreField",
    "Subject",
    "TimestepInfluence",
    "TimestepVariance",
    "Trajectories",
]
