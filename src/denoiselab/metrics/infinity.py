"""The Frechet distance of infinitely many images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DIGITS, Features, labels
from denoiselab.metrics.frechet import REFERENCES, Gaussian, known, real_part
from denoiselab.rng import generator

PARTS = (1, 2, 3, 4)
"""Into how many disjoint parts the sets are divided, for distances at as many sizes."""

ROWS = 2 * max(PARTS)
"""Least samples for each feature."""

BLOCKS = 10
"""Of the jackknife."""


class FrechetInfinity(Metric):
    """fd_infinity_NAME: the Frechet distance extrapolated to infinitely many images, the intercept of
    FD(N) = FD_infinity + c/N; fid_infinity in the features of Inception's standard weights alone.

    The bias of a Frechet distance is proportional to 1/N where N is well above the number of features, with a constant
    that depends on the model, so that models can be ranked wrongly at equal N (Chong and Forsyth 2020,
    arXiv:1911.07023, section 3). Both sets are divided at random into g = 1, 2, 3 and 4 disjoint parts, the distance of
    N = n/g samples is the mean over the g pairs of parts, and a line is fitted to the four by least squares.

    Unlike the paper's, which holds the real set fixed and keeps its part of the bias, the real set shrinks along with
    the samples, so that two sets of one distribution give 0 on average; it can be negative. Costs 120 distances.

    Controls: ``floor``, the same of two halves of the training set; ``at_n``, the distance that is extrapolated.
    Details: ``low`` and ``high``, the 95 % interval from a jackknife over 10 blocks of both sets, value -/+ 2.26
    standard errors (Student's t with 9 degrees of freedom), which is too wide near 0; ``n`` and ``fd`` of the line.

    Args:
        features: what it is measured in.
        reference: the real images that it is a distance to, train or held_out.

    Needs 8 times as many samples, and real images, as there are features: below, bias is not a line in 1/N.
    """

    least = 2 * ROWS

    def __init__(self, features: Features = DIGITS, reference: str = "train"):
        self.features, self.reference = features, known(reference)

    def check(self, data: Data) -> None:
        self.features.check(data)
        if self.features.dims is not None:
            self.least = ROWS * self.features.dims
            for part, need in {self.reference: self.least, "train": 2 * self.least}.items():
                size = len(getattr(data, part))
                if size < need:
                    raise ValueError(
                        f"reference={self.reference}: fd_infinity in {self.features.dims} features needs {need} real "
                        f"images in {part}; there are {size}"
                    )

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        n = len(generated)
        real, fake = (
            ordered(real_part(data, self.features, self.reference), labels(getattr(data, self.reference))),
            ordered(self.features(generated), label),
        )
        least = ROWS * fake.shape[1]
        if n < least:
            raise ValueError(f"n={n}: need at least {least} samples for a line in 1/n, {ROWS} times the features")
        sizes, distances = curve(real, fake)
        value = intercept(sizes, distances)
        error = jackknife(real, fake)
        train = ordered(real_part(data, self.features, "train"), labels(data.train))
        floor = intercept(*curve(train[::2], train[1::2]))
        return [
            Measurement(
                self.features.called("fd_infinity"),
                value,
                better="lower",
                controls={"floor": floor, "at_n": distances[0].item()},
                protocol={
                    **self.features.protocol,
                    "implementation": "QR and singular values, float64",
                    "reference": f"{REFERENCES[self.reference]} images, as large a part of them as of the samples",
                    "n_real": len(real),
                    "fit": f"least squares in 1/n over n/{', n/'.join(map(str, PARTS))}, disjoint parts",
                    "interval": f"jackknife, {BLOCKS} blocks of both sets",
                },
                details={
                    "low": value - STUDENT * error,
                    "high": value + STUDENT * error,
                    "n": sizes.tolist(),
                    "fd": distances.tolist(),
                },
            )
        ]


STUDENT = 2.262157
"""The 97.5 % quantile of Student's t with BLOCKS - 1 degrees of freedom."""


def ordered(rows: Tensor, label: Tensor | None = None) -> Tensor:
    """By class, where classes are given, and in each in a random order that is always the same.

    Every g-th row then has the class shares of the whole. Sets that hold classes in fixed shares need it: in random
    parts shares vary, which they do not in the whole, and the line would end too low. Sets of independent draws must
    not have it, for the line would end too high.
    """
    order = torch.randperm(len(rows), generator=generator(0, "infinity", len(rows)))
    return rows[order if label is None else order[label[order].argsort(stable=True)]]


def curve(x: Tensor, y: Tensor, without: int | None = None) -> tuple[Tensor, Tensor]:
    """(N, FD(N)) of real rows x and samples y, ``ordered``, N being the mean size of the parts; (4,) each, float64.

    Args:
        without: a block, one of 10, that is left out of both.
    """
    sizes, found = [], []
    for parts in PARTS:
        pairs = [tuple(part(rows, i, parts, without) for rows in (x, y)) for i in range(parts)]
        found.append(sum(Gaussian.of(a).distance(Gaussian.of(b)) for a, b in pairs) / parts)
        sizes.append(sum(len(b) for _, b in pairs) / parts)
    return torch.tensor(sizes, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)


def part(rows: Tensor, i: int, parts: int, without: int | None = None) -> Tensor:
    """Rows i, i + parts, ...: the rest stay in their part when a block is left out."""
    position = torch.arange(i, len(rows), parts)
    # Twelve rows in a row are of one block, so that a block takes as much of every part and of every class.
    return rows[position if without is None else position[position // math.lcm(*PARTS) % BLOCKS != without]]


def intercept(sizes: Tensor, distances: Tensor) -> float:
    """Of the line of least squares through distances over 1/N, at 1/N = 0."""
    columns = torch.stack([torch.ones_like(sizes), 1 / sizes], 1)
    return torch.linalg.lstsq(columns, distances[:, None]).solution[0, 0].item()


def jackknife(x: Tensor, y: Tensor) -> float:
    """The standard error of the intercept: sqrt((B - 1)/B sum (theta_b - mean)^2), theta_b without block b of both."""
    found = torch.tensor([intercept(*curve(x, y, block)) for block in range(BLOCKS)], dtype=torch.float64)
    return ((BLOCKS - 1) * found.var(unbiased=False)).sqrt().item()
