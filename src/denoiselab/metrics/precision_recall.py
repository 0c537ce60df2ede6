"""Improved precision and recall, density and coverage: are samples like real images, and are all of these covered?"""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DIGITS, Features, labels, real_features
from denoiselab.metrics.frechet import floor_draws


class PrecisionRecall(Metric):
    """Improved precision and recall of generated images (Kynkaanniemi et al. 2019, arXiv:1904.06991), in the features
    of a network; of ``DigitsNet`` unless another is given.

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest other feature of
    the set (eq. 1). precision is the share of generated samples within the real manifold, recall the share of real
    samples within the generated manifold (eq. 2); both in [0, 1]. The training images are the real set for both. With
    few samples the balls are large: compare values of the same n only.

    Control ``held_out``: the same with the held-out images in place of the generated ones, whatever their number.

    Args:
        k: which neighbour a ball reaches to, >= 1; the paper uses 3. Needs more than k samples.
        features: what it is measured in.
    """

    def __init__(self, k: int = 3, features: Features = DIGITS):
        if k < 1:
            raise ValueError(f"k={k}: need at least 1")
        self.k, self.least, self.features = k, k + 1, features

    def check(self, data: Data) -> None:
        self.features.check(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        train, held_out = real_features(data, self.features)
        radius = radii(train, self.k)
        found, control = (self.both(train, radius, rows) for rows in (self.features(generated), held_out))
        protocol = {
            **self.features.protocol,
            "k": self.k,
            "reference": "training images, for precision and recall",
            "n_real": len(train),
            "n_held_out": len(held_out),
        }
        names = [self.features.called(what) for what in ("precision", "recall")]
        return [
            Measurement(name, value, better="higher", controls={"held_out": held_out_value}, protocol=dict(protocol))
            for name, value, held_out_value in zip(names, found, control, strict=True)
        ]

    def both(self, real: Tensor, real_radius: Tensor, fake: Tensor) -> tuple[float, float]:
        """(precision, recall)."""
        return covered(fake, real, real_radius), covered(real, fake, radii(fake, self.k))


class DensityCoverage(Metric):
    """Density and coverage of generated images (Naeem et al. 2020, arXiv:2002.09797, eq. 4 and 6), in the features of a
    network; of ``DigitsNet`` unless another is given.

    With balls around N real images, each reaching to the k-th nearest other one, and M samples: density is the number
    of balls that a sample is in, over k, on average; coverage is the share of balls with a sample in them. Unlike
    precision, one far real image does not count for more than one ball, and coverage needs no balls around samples. For
    equal distributions the mean of density is 1 and that of coverage
    1 - (N - 1)...(N - k)/((M + N - 1)...(M + N - k)) (lemma 2), which is 0.97 for M = N and k = 5.

    The real images are as many of the training set as there are samples, if there are so many, with the training set's
    class shares, because coverage depends on M/N.

    Controls: ``held_out``, the same of the held-out images among as many training images; ``expected``, as above.

    Args:
        k: which neighbour a ball reaches to, >= 1; the paper uses 5. Needs more than k samples.
        features: what it is measured in.
    """

    def __init__(self, k: int = 5, features: Features = DIGITS):
        if k < 1:
            raise ValueError(f"k={k}: need at least 1")
        self.k, self.least, self.features = k, k + 1, features

    def check(self, data: Data) -> None:
        self.features.check(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        train, held_out = real_features(data, self.features)
        classes = labels(data.train)
        fake = self.features(generated)
        n_real = min(len(fake), len(train))
        found, control = (
            density_coverage(train[floor_draws(classes, min(len(rows), len(train)))[0]], rows, self.k)
            for rows in (fake, held_out)
        )
        protocol = {
            **self.features.protocol,
            "k": self.k,
            "reference": "training images, stratified",
            "n_real": n_real,
            "n_held_out": len(held_out),
        }
        expected = 1.0, expected_coverage(n_real, len(fake), self.k)
        names = [self.features.called(what) for what in ("density", "coverage")]
        return [
            Measurement(name, value, "higher", {"held_out": real, "expected": due}, dict(protocol))
            for name, value, real, due in zip(names, found, control, expected, strict=True)
        ]


def density_coverage(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """(density, coverage) of samples (M, D) among real features (N, D)."""
    radius = radii(real, k)
    inside, hit = 0, torch.zeros(len(real), dtype=torch.bool)
    for part in fake.split(1024):
        within = distances(part, real) <= radius
        inside += int(within.sum())
        hit |= within.any(0)
    return inside / (k * len(fake)), hit.double().mean().item()


def expected_coverage(n_real: int, n_fake: int, k: int) -> float:
    """The mean of coverage where both sets are of one distribution.

    >>> round(expected_coverage(10_000, 10_000, 5), 2)
    0.97
    """
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (n_real - i) / (n_real + n_fake - i)
    return 1 - missed


def distances(a: Tensor, b: Tensor) -> Tensor:
    """L2 distances (N, M) by differences: exactly 0 between equal rows, which the product formula is not."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def radii(rows: Tensor, k: int) -> Tensor:
    """Each row's distance to its k-th nearest other row, (N,)."""
    if len(rows) <= k:
        raise ValueError(f"n={len(rows)}: need more than k={k} samples")
    # The nearest row is the row itself.
    return torch.cat([distances(part, rows).kthvalue(k + 1, dim=1).values for part in rows.split(1024)])


def covered(rows: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Share of rows within the radius of any centre."""
    inside = [(distances(part, centres) <= radius).any(dim=1) for part in rows.split(1024)]
    return torch.cat(inside).double().mean().item()
