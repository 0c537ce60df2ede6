"""Small sets of images for tests of what is measured on images."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data import Digits, Identity
from denoiselab.data.base import Data, Samples
from denoiselab.rng import generator


class Images(Data):
    """Given images, the first part of them to train on."""

    def __init__(self, images: Tensor, train: int):
        super().__init__(batch_size=1)
        self.shape, self.codec = tuple(images.shape[1:]), Identity(1.0)
        self.train, self.held_out = Samples(images[:train]), Samples(images[train:])


def coloured(n: int, side: int = 32, train: int = 0, seed: int = 0) -> Images:
    """Blurred noise in colour, all different, without labels."""
    noise = torch.randn(n, 3, side // 4, side // 4, generator=generator(seed, "coloured"))
    return Images(torch.nn.functional.interpolate(noise, side, mode="bicubic").clamp(-1, 1), train)


def digits(n: int = 300) -> tuple[Digits, Tensor, Tensor]:
    """The set of digits, and n of its training images with their labels, of every class."""
    data = Digits()
    order = torch.randperm(len(data.train), generator=generator(0, "test-digits"))[:n]
    assert data.train.label is not None
    return data, data.train.x_0[order], data.train.label[order]
