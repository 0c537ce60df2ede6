"""The features that distances between sets of images are measured in, and a small network for digits."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from denoiselab.data.base import Data, Samples, some

SIDE = 8
"""Pixels a side of what the classifiers look at."""

REAL = 50_000
"""At most so many real images of a part are used."""

WEIGHTS = Path(__file__).with_name("digits_net.safetensors")


class Features:
    """phi(images): rows of numbers for images, in which distances between sets are measured; a subclass writes
    ``look`` and ``protocol``.

    What is measured in them is called by the measurement and by ``name``, as in fd_digits, unless ``names`` says
    otherwise. Two objects of one class and protocol are the same, so that metrics share what they compute: features of
    a set of images are computed once for as long as it lives.
    """

    name: str = "features"
    names: dict[str, str] = {}  # noqa: RUF012
    """What measurements are called where NAME_SELF.NAME is not it: those whose published name these features earn."""
    batch: int = 128
    """Images that are looked at together."""
    dims: int | None = None
    """D, where it is known before anything was looked at."""

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) of images (B, C, H, W) in [-1, 1] on the CPU, and logits (B, K) where there are some."""
        raise NotImplementedError

    @property
    def protocol(self) -> dict[str, Any]:
        """``extractor``, ``extractor_sha256`` of its weights, ``preprocessing``: what numbers measured in it depend
        on."""
        raise NotImplementedError

    def check(self, data: Data) -> None:
        """Raise ValueError, in one line, unless these data can be looked at."""
        if len(data.shape) != 3 or data.shape[0] not in (1, 3):
            wants = "; points want metrics=points" if len(data.shape) == 1 else ""
            raise ValueError(
                f"metrics: {self.name} looks at images of 1 or 3 channels; data of shape {data.shape}{wants}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D), float64 on the CPU."""
        return self._seen(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K), float64 on the CPU.

        Raises:
            ValueError: there are none.
        """
        found = self._seen(images)[1]
        if found is None:
            raise ValueError(f"features={self.name}: this network says no classes")
        return found

    def called(self, what: str) -> str:
        """A measurement's name in these features."""
        return self.names.get(what, f"{what}_{self.name}")

    @torch.no_grad()
    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        known: dict[Any, tuple[Tensor, Tensor | None]] = SEEN.setdefault(images, {})  # pyright: ignore[reportAssignmentType]
        key = (self, images._version)
        if key not in known:
            # TF32 would make features depend on the device in the third digit.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = [self.look(part) for part in images.split(self.batch)]
            rows, logits = zip(*found, strict=True)
            whole = None if logits[0] is None else torch.cat(logits).double().cpu()
            known[key] = torch.cat(rows).double().cpu(), whole
        return known[key]

    def _key(self) -> tuple[Any, ...]:
        return type(self), repr(sorted(self.protocol.items()))

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Features) and self._key() == other._key()


SEEN = WeakTensorKeyDictionary()
"""Features of sets of images that are still there."""


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


class DigitsFeatures(Features):
    """The 64 features of the shipped ``DigitsNet``, on the CPU; what is measured in them is called fd_digits,
    kd_digits, precision, recall, density, coverage."""

    name = "digits"
    names = {name: name for name in ("precision", "recall", "density", "coverage")}  # noqa: RUF012
    batch = 1024
    dims = DigitsNet.num_features

    def check(self, data: Data) -> None:
        check_digits(data)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        net = DigitsNet.pretrained()
        rows = net.features(images)
        return rows, net.head(rows)

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "extractor": "DigitsNet",
            "extractor_sha256": DigitsNet.pretrained().sha256,
            "preprocessing": f"values in [-1, 1], area-averaged to {SIDE}x{SIDE}",
        }


DIGITS = DigitsFeatures()
"""What metrics look at unless they are told otherwise."""


@lru_cache(maxsize=2)
def real_features(data: Data, features: Features = DIGITS) -> tuple[Tensor, Tensor]:
    """Features of the training and of the held-out images, at most 50,000 of each; kept for the next metric."""
    train, held_out = (_of(part, data, features) for part in (data.train, data.held_out))
    return train, held_out


def _of(samples: Samples, data: Data, features: Features) -> Tensor:
    """A batch at a time, so that a set may be larger than memory."""
    parts = some(len(samples), REAL).split(features.batch)
    return torch.cat([features(data.codec.decode(samples.batch(index)["x_0"])) for index in parts])


def labels(samples: Samples) -> Tensor:
    """The classes of those whose features ``real_features`` has; one class where there are no labels."""
    index = some(len(samples), REAL)
    return torch.zeros_like(index) if samples.label is None else samples.label[index]


def check_digits(data: Data) -> None:
    """Raise ValueError unless the data are ten classes of one-channel images."""
    if len(data.shape) != 3 or data.shape[0] != 1 or data.num_classes != 10:
        what = f"data of shape {data.shape} with {data.num_classes} classes"
        if len(data.shape) == 1:
            what = f"data of shape {data.shape} wants metrics=points"
        raise ValueError(f"metrics=digits measures handwritten digits of shape (1, S, S), 10 classes; {what}")


def digits_features(images: Tensor) -> Tensor:
    """``DigitsNet.features`` of the shipped network as float64 (N, 64)."""
    return DIGITS(images)
