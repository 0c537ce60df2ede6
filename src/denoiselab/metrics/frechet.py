"""The Frechet distance between generated and real images, at the number of samples that there are."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DIGITS, Features, labels, real_features
from denoiselab.rng import generator

FLOOR_DRAWS = 10

REFERENCES = {"held_out": "held-out", "train": "training"}


class Gaussian(NamedTuple):
    """The normal distribution of a set's mean and covariance."""

    mean: Tensor
    """(D,)"""
    root: Tensor
    """R with R^T R the unbiased covariance, (min(N, D), D)."""

    @classmethod
    def of(cls, rows: Tensor) -> Gaussian:
        """Of features (N, D), in float64. The root comes from the rows themselves, since a covariance has lost half of
        the digits of its small directions."""
        rows = rows.double()
        mean = rows.mean(0)
        return cls(mean, torch.linalg.qr(rows - mean, mode="r").R / (len(rows) - 1) ** 0.5)

    def distance(self, other: Gaussian) -> float:
        """The squared 2-Wasserstein distance. tr (C_a C_b)^(1/2) is the sum of the singular values of R_a R_b^T, since
        their squares are the eigenvalues of C_a C_b; it holds for singular covariances too."""
        apart = (self.mean - other.mean).square().sum()
        own = self.root.square().sum() + other.root.square().sum()
        return (apart + own - 2 * torch.linalg.svdvals(self.root @ other.root.T).sum()).item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64.

    The squared 2-Wasserstein distance between Gaussians of these means and (unbiased) covariances (Heusel et al. 2017,
    arXiv:1706.08500, eq. 6). In squared units of the features; >= 0 but for rounding.
    """
    return Gaussian.of(a).distance(Gaussian.of(b))


def null_bias(d: int, n: int, m: int) -> float:
    """What two sets of n and m draws of the same N(0, I) in d dimensions are apart on average, to first order:
    (d + (d^2 + d)/4) (1/n + 1/m). The first d is the means', the rest the covariances'.

    >>> round(null_bias(128, 1000, 1000), 2)
    8.51
    """
    return (d + (d * d + d) / 4) * (1 / n + 1 / m)


class FrechetDistance(Metric):
    """fd_NAME: the Frechet distance between generated and real images in the features of a network; fd_digits unless
    another is given, and fid in those of Inception's standard weights alone.

    The distance is biased upwards for finite sets (Chong and Forsyth 2020, arXiv:1911.07023), see ``null_bias``, so it
    comes with a floor: what as many real images of the part that is not the reference get, the mean of 10 draws. The
    draws have that part's class shares, because samples are asked for class by class, and uneven classes alone would
    raise the floor by half at n = 100. No image is drawn twice while n is at most the part's size (``floor_distinct``).
    ``floor_std`` is over these draws, which overlap: fresh images would vary more.

    Only distances of the same n, against the same images and with the same weights' hash, can be compared. It sees the
    mean and the covariance of features and nothing else: samples that have both right may be no images at all, so
    precision and recall belong beside it. Raises ValueError for fewer than 2 samples; with no more samples than
    features the samples' covariance is singular and the floor is high.

    Args:
        features: what it is measured in.
        reference: the real images that it is a distance to: held_out, or train, which published FIDs take.
    """

    least = 2

    def __init__(self, features: Features = DIGITS, reference: str = "held_out"):
        self.features, self.reference = features, known(reference)

    def check(self, data: Data) -> None:
        self.features.check(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        n = len(generated)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2 samples for a covariance")
        real = gaussian_of(data, self.features, self.reference)
        value = real.distance(Gaussian.of(self.features(generated)))
        others, classes = other_part(data, self.features, self.reference)
        draws = torch.tensor(
            [real.distance(Gaussian.of(others[index])) for index in floor_draws(classes, n)], dtype=torch.float64
        )
        floor = draws.mean().item()
        other = "train" if self.reference == "held_out" else "held_out"
        return [
            Measurement(
                self.features.called("fd"),
                value,
                better="lower",
                controls={"floor": floor, "floor_std": draws.std().item()},
                protocol={
                    **self.features.protocol,
                    "implementation": "QR and singular values, float64",
                    "dimensions": others.shape[1],
                    "reference": f"{REFERENCES[self.reference]} images",
                    "n_real": len(real_part(data, self.features, self.reference)),
                    "floor": f"mean of {FLOOR_DRAWS} draws of n {REFERENCES[other]} images, stratified",
                    "floor_distinct": min(n, len(others)),
                },
                details={"ratio_to_floor": value / floor},
            )
        ]


def known(reference: str) -> str:
    """A part of the data set.

    Raises:
        ValueError: it is none.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference={reference}: need one of {', '.join(REFERENCES)}")
    return reference


def real_part(data: Data, features: Features, part: str) -> Tensor:
    """Features of the training or of the held-out images."""
    train, held_out = real_features(data, features)
    return train if part == "train" else held_out


def other_part(data: Data, features: Features, part: str) -> tuple[Tensor, Tensor]:
    """Features and classes of the images that are not in the part."""
    if part == "train":
        return real_part(data, features, "held_out"), labels(data.held_out)
    return real_part(data, features, "train"), labels(data.train)


@lru_cache(maxsize=2)
def gaussian_of(data: Data, features: Features, part: str) -> Gaussian:
    """Of the real images; kept for the next metric."""
    return Gaussian.of(real_part(data, features, part))


def floor_draws(label: Tensor, n: int) -> list[Tensor]:
    """Positions of n images, ten times, each class by its share of the labels (N,)."""
    draws = []
    for draw in range(FLOOR_DRAWS):
        shuffled = torch.randperm(len(label), generator=generator(0, "fd-floor", draw))
        by_class = shuffled[label[shuffled].argsort(stable=True)]
        # Even steps through the classes: a random part of each, and no position twice unless n > N.
        draws.append(by_class[torch.arange(n) * len(label) // n])
    return draws
