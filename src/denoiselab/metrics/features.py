"""The features that distances between sets of digits are measured in: a small classifier, shipped with its weights."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.data.base import Data

SIDE = 8
"""Pixels a side of what the classifiers look at."""

WEIGHTS = Path(__file__).with_name("digits_net.safetensors")


def small(images: Tensor) -> Tensor:
    """(N, 1, S, S) images averaged over areas to (N, 1, 8, 8); 8x8 images stay as they are."""
    return F.adaptive_avg_pool2d(images, SIDE)


class DigitsNet(nn.Module):
    """A convolutional classifier of (N, 1, S, S) digits in [-1, 1], looked at as 8x8 pixels.

    Inception's features (Heusel et al. 2017, arXiv:1706.08500) are of photographs at 299x299 and mean little for 8x8
    scans; these are of digits. Trained by scripts/train_digits_net.py on the training split of
    ``denoiselab.data.Digits`` alone, so its held-out digits are new to it. Numbers measured with it can be compared
    with each other only, never with a published FID: record ``sha256`` beside them.

    >>> net = DigitsNet.pretrained()
    >>> net(torch.zeros(2, 1, 16, 16)).shape, net.features(torch.zeros(2, 1, 8, 8)).shape
    (torch.Size([2, 10]), torch.Size([2, 64]))
    """

    num_features = 64

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * (SIDE // 4) ** 2, self.num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """The layer before the logits, (N, 64)."""
        return self.body(small(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes, (N, 10)."""
        return self.head(self.features(images))

    @classmethod
    @cache
    def pretrained(cls) -> DigitsNet:
        """The shipped network, in evaluation mode; one object for all callers."""
        net = cls()
        net.load_state_dict(load_file(WEIGHTS))
        return net.eval().requires_grad_(False)

    @property
    def sha256(self) -> str:
        """The hash of the shipped weights' file, in hexadecimal."""
        return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


@torch.no_grad()
def digits_features(images: Tensor) -> Tensor:
    """``DigitsNet.features`` of the shipped network as float64 (N, 64)."""
    net = DigitsNet.pretrained()
    return torch.cat([net.features(part) for part in images.split(1024)]).double()


@lru_cache(maxsize=1)
def real_features(data: Data) -> tuple[Tensor, Tensor]:
    """Features of the training and of the held-out digits; kept for the next metric."""
    train, held_out = (digits_features(data.codec.decode(part.x_0)) for part in (data.train, data.held_out))
    return train, held_out


def extractor_protocol() -> dict[str, Any]:
    """What a number measured in these features depends on."""
    return {
        "extractor": "DigitsNet",
        "extractor_sha256": DigitsNet.pretrained().sha256,
        "preprocessing": f"values in [-1, 1], area-averaged to {SIDE}x{SIDE}",
    }


def check_digits(data: Data) -> None:
    """Raise ValueError unless the data are ten classes of one-channel images."""
    if len(data.shape) != 3 or data.shape[0] != 1 or data.num_classes != 10:
        what = f"data of shape {data.shape} with {data.num_classes} classes"
        if len(data.shape) == 1:
            what = f"data of shape {data.shape} wants metrics=points"
        raise ValueError(f"metrics=digits measures handwritten digits of shape (1, S, S), 10 classes; {what}")
