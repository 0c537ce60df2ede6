"""Where samples are clustered and compared: coordinates of points, features of digits, pixels of other images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from denoiselab.data.base import Data, Samples, some
from denoiselab.metrics.features import DIGITS, Features

SPACES = ("features", "pixels")

SIDE = 16
"""Most pixels a side that images are compared at, unless in full."""

MOST = 50_000
"""Most real samples that are looked at; of a larger set a fixed random subset."""

AT_ONCE = 512
"""Real samples that are decoded at a time."""


class Space(NamedTuple):
    """A map from decoded samples to vectors, with what numbers measured there depend on."""

    vectors: Callable[[Tensor], Tensor]
    """Decoded samples (N, ...) to float64 (N, D)."""
    protocol: dict[str, Any]


def space_of(data: Data, name: str = "features", features: Features | None = None) -> Space:
    """The space that samples of a data set are compared in.

    Args:
        name: ``features``: the given ones; where none are given those of ``DigitsNet`` for digits, coordinates for
            points, and otherwise pixels averaged over areas to at most 16 a side, which see colour and layout and no
            detail. ``pixels``: all of them, in [-1, 1]; coordinates for points.
        features: of images.

    Raises:
        ValueError: another name, or features that cannot look at these data.
    """
    if name not in SPACES:
        raise ValueError(f"space={name}: need one of {', '.join(SPACES)}")
    if name == "features" and features is not None:
        features.check(data)
        return Space(features, {"space": "features", **features.protocol})
    if len(data.shape) == 1:
        return Space(flat, {"space": "coordinates"})
    if name == "pixels":
        return Space(flat, {"space": f"pixels in [-1, 1], {'x'.join(map(str, data.shape))}"})
    try:
        DIGITS.check(data)
    except ValueError:
        return Space(averaged, {"space": f"pixels in [-1, 1], area-averaged to at most {SIDE}x{SIDE}"})
    return Space(DIGITS, {"space": "features", **DIGITS.protocol})


def flat(samples: Tensor) -> Tensor:
    return samples.flatten(1).double()


def averaged(images: Tensor) -> Tensor:
    """Pixels of images (N, C, H, W), averaged over areas to at most 16 x 16."""
    height, width = images.shape[-2:]
    return flat(F.adaptive_avg_pool2d(images, (min(height, SIDE), min(width, SIDE))))


def positions(samples: Samples, most: int = MOST) -> Tensor:
    """Of all samples, or of ``most`` that depend on nothing but the set's size, in rising order."""
    return some(len(samples), most)


def decoded(samples: Samples, data: Data, index: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The samples at these positions as people see them and their labels, a part at a time, so that memory is
    bounded where they are read from files."""
    for part in index.split(AT_ONCE):
        batch = samples.batch(part)
        yield data.codec.decode(batch["x_0"]).float(), batch["cond"].get("label")


def vectors_of(
    samples: Samples, data: Data, space: Space, tell: Callable[[int], object] = lambda done: None
) -> tuple[Tensor, Tensor | None]:
    """Vectors (N, D) of a set's samples, at most 50,000, and their labels (N,) or None.

    Args:
        tell: is told how many each part added.
    """
    parts = []
    for x, label in decoded(samples, data, positions(samples)):
        parts.append((space.vectors(x), label))
        tell(len(x))
    labels = [label for _, label in parts if label is not None]
    return torch.cat([vectors for vectors, _ in parts]), torch.cat(labels) if labels else None
