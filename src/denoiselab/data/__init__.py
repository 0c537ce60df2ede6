"""Data sets and codecs."""

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Codec, Identity, Standardise
from denoiselab.data.digits import Digits
from denoiselab.data.points import EightGaussians
from denoiselab.data.stream import Stream

__all__ = ["Codec", "Data", "Digits", "EightGaussians", "Identity", "Samples", "Standardise", "Stream"]
