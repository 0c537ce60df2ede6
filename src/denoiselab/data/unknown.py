"""The data of a network that came without them."""

from __future__ import annotations

from collections.abc import Sequence

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Codec, Identity, Standardise
from denoiselab.errors import UserError
from denoiselab.models.layers import require

IMAGES = (1, 3)
"""Channels of what is an image, grey or in colour."""


class Unknown(Data):
    """The shape and the classes of data whose samples are not here. It can be sampled like, not trained on.

    What has one or three channels is taken for images in [-1, 1]; anything else stays as the network makes it.

    Args:
        shape: one sample's.
        num_classes: 0 for no labels.
        batch_size: of no effect.
    """

    def __init__(self, shape: Sequence[int], num_classes: int = 0, batch_size: int = 1):
        super().__init__(batch_size)
        need = "whole numbers > 0, as in [3,32,32]"
        require("shape", list(shape), len(shape) > 0 and all(isinstance(n, int) and n > 0 for n in shape), need)
        require("num_classes", num_classes, num_classes >= 0, "a number >= 0")
        self.shape, self.num_classes = tuple(shape), num_classes
        image = len(self.shape) == 3 and self.shape[0] in IMAGES
        self.codec: Codec = Identity(1.0) if image else Standardise([0.0], 1.0)

    @property
    def train(self) -> Samples:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise UserError(NO_SAMPLES)

    @property
    def held_out(self) -> Samples:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise UserError(NO_SAMPLES)


NO_SAMPLES = "data=unknown: it has no samples; name the data to train on or to compare with, as in data=digits"
