"""Two-dimensional point sets, most of them with exact densities."""

from denoiselab.data.points.base import Known, Points
from denoiselab.data.points.curves import Moons, SwissRoll, TwoSpirals
from denoiselab.data.points.mixtures import EightGaussians, Mixture
from denoiselab.data.points.pinwheel import Pinwheel
from denoiselab.data.points.rings import Circles, Rings
from denoiselab.data.points.spread import Checkerboard

__all__ = [
    "Checkerboard",
    "Circles",
    "EightGaussians",
    "Known",
    "Mixture",
    "Moons",
    "Pinwheel",
    "Points",
    "Rings",
    "SwissRoll",
    "TwoSpirals",
]
