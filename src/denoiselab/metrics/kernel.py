"""The kernel distance between generated and real images: KID, in the features of any network."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DIGITS, Features
from denoiselab.metrics.frechet import FLOOR_DRAWS, REFERENCES, floor_draws, known, other_part, real_part
from denoiselab.rng import generator

SUBSETS, SIZE, NULL_SUBSETS = 100, 1000, 10
"""Of Binkowski et al. and of torchmetrics; and for each draw of the null."""


class KernelDistance(Metric):
    """kd_NAME: the unbiased squared MMD with kernel (x.y/D + 1)^3 between generated and real images in the features of
    a network (Binkowski et al. 2018, arXiv:1801.01401, section 4); kid in those of Inception's standard weights alone.

    The mean over 100 pairs of random subsets of 1,000 each, or of as many as there are in the smaller set. Unlike the
    Frechet distance it is unbiased: zero on average for equal distributions whatever n, so that it is sometimes
    negative, and it sees more of the distributions than their means and covariances.

    Unbiased means for independent draws. Samples that are asked for class by class are not: pairs of one class are
    rarer among them, which makes the value less, by the order of k/n, where features tell classes apart. So read it
    against its null, for which classes have fixed shares too.

    Controls: ``null_mean`` and ``null_std`` over 10 draws of n real images of the part that is not the reference, in
    place of samples, drawn as for ``FrechetDistance``, with 10 pairs of subsets each; they overlap. Details:
    ``above_null``, value - null_mean; ``std`` over the subsets, which overlap.

    Args:
        features: what it is measured in.
        reference: the real images that it is a distance to, held_out or train.
    """

    least = 2

    def __init__(self, features: Features = DIGITS, reference: str = "held_out"):
        self.features, self.reference = features, known(reference)

    def check(self, data: Data) -> None:
        self.features.check(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        n = len(generated)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2 samples")
        real = real_part(data, self.features, self.reference)
        others, classes = other_part(data, self.features, self.reference)
        found = over_subsets(real, self.features(generated))
        draws = floor_draws(classes, n)
        null = torch.stack([over_subsets(real, others[index], NULL_SUBSETS).mean() for index in draws])
        other = "train" if self.reference == "held_out" else "held_out"
        return [
            Measurement(
                self.features.called("kd"),
                found.mean().item(),
                better="lower",
                controls={"null_mean": null.mean().item(), "null_std": null.std().item()},
                protocol={
                    **self.features.protocol,
                    "estimator": f"unbiased, float64, mean of {SUBSETS} pairs of subsets",
                    "kernel": "(x.y/D + 1)^3",
                    "subset_size": min(SIZE, n, len(real)),
                    "reference": f"{REFERENCES[self.reference]} images",
                    "n_real": len(real),
                    "null": f"{FLOOR_DRAWS} draws of n {REFERENCES[other]} images, stratified; {NULL_SUBSETS} pairs",
                },
                details={"above_null": (found.mean() - null.mean()).item(), "std": found.std().item()},
            )
        ]


def over_subsets(x: Tensor, y: Tensor, subsets: int = SUBSETS) -> Tensor:
    """The estimate for pairs of random subsets of equal size, (subsets,), always the same ones."""
    size = min(SIZE, len(x), len(y))
    found = []
    for subset in range(subsets):
        g = generator(0, "kernel-subsets", subset)
        a, b = (rows[torch.randperm(len(rows), generator=g)[:size]] for rows in (x, y))
        found.append(polynomial_mmd2(a, b))
    return torch.stack(found)


def polynomial_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased MMD^2 of (n, D) and (m, D) with k(x, y) = (x.y/D + 1)^3, a float64 scalar."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)

    def between(a: Tensor, b: Tensor) -> Tensor:
        base = a @ b.T / a.shape[1] + 1
        return base * base * base

    def within(a: Tensor) -> Tensor:
        gram = between(a, a)
        return gram.sum() - gram.diagonal().sum()

    return within(x) / (n * (n - 1)) + within(y) / (m * (m - 1)) - 2 * between(x, y).mean()
