"""Guidance: denoisers made of denoisers."""

from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided
from denoiselab.guidance.cfg import CFG, both, scale_from_w

__all__ = ["CFG", "DenoiserLike", "Guidance", "both", "outputs_of", "scale_from_w", "unguided"]
