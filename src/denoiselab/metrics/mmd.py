"""Two-dimensional points: the kernel two-sample distance, and how many modes are found."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.data.points import Mixture
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.rng import generator

REAL = 2000
"""At most so many held-out points are used."""

WIDTHS = (0.5, 1.0, 2.0)
"""Kernel widths in units of the median distance."""

NULL_DRAWS = 200


class KernelMMD(Metric):
    """mmd2: the unbiased squared maximum mean discrepancy between generated and held-out points.

    For samples x_1..x_n and real points y_1..y_m (Gretton et al. 2012, JMLR 13:723, eq. 3)::

        MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
                - 2 sum_{i, j} k(x_i, y_j) / (n m)
        k(x, y) = mean over c in {1/2, 1, 2} of exp(-|x - y|^2 / (2 (c med)^2))

    where med is the median distance between the y, at most 2,000 held-out points, always the same. Zero in
    expectation for equal distributions, so that it is sometimes negative; at most 2. It sees what is wider than half
    the median distance, so missing or misplaced modes, and hardly the spread within one.

    Controls: ``null_mean`` and ``null_95``, the mean and the 95 % quantile of 200 draws with two disjoint sets of n and
    m training points: a value above null_95 is a difference seen at the 5 % level. The draws are splits of one pool
    of n + m points (a permutation test, section 5 there). Where the training set is smaller than n + m, the null is of
    the ``null_n`` points that it has room for, and wider than it should be.
    """

    least = 2

    def check(self, data: Data) -> None:
        check_points(data)
        if len(data.held_out) < 2 or len(data.train) < min(len(data.held_out), REAL) + 2:
            raise ValueError(
                f"metrics=points: need at least 2 held-out points and 2 more to train on; "
                f"data has {len(data.held_out)} and {len(data.train)}"
            )

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        if len(generated) < 2:
            raise ValueError(f"n={len(generated)}: need at least 2 samples")
        x, y = generated.double(), subset(data, data.held_out.x_0, REAL)
        med = torch.pdist(y).median().item()
        null_n = min(len(x), len(data.train) - len(y))
        pool = subset(data, data.train.x_0, null_n + len(y))
        null = splits(pool, null_n, med)
        return [
            Measurement(
                "mmd2",
                mmd2(x, y, med),
                better="lower",
                controls={"null_mean": null.mean().item(), "null_95": null.quantile(0.95).item()},
                protocol={
                    "estimator": "unbiased, float64",
                    "kernel": f"mean of Gaussians of widths {WIDTHS} times median distance",
                    "median_distance": med,
                    "reference": "held-out points",
                    "n_real": len(y),
                    "null": f"{NULL_DRAWS} splits of training points",
                    "null_n": null_n,
                },
            )
        ]


class ModeCoverage(Metric):
    """modes_covered: how many modes of a Gaussian mixture hold a fair share of the samples.

    A sample belongs to the mode that it is likeliest to come from, if it is within 4 standard deviations of its mean
    (Mahalanobis' distance). A mode of weight w counts if at least w n/10 of n samples belong to it, a tenth of its due.
    Control ``held_out``: the same of the held-out points, which is less than the number of modes where some hide under
    others.

    Details: ``share``, per mode, of all samples (its weight if all is well and modes do not overlap); ``outside``, the
    share of samples that belong to none (exp(-8) = 0.0003 of real points).
    """

    def check(self, data: Data) -> None:
        if not isinstance(data, Mixture):
            raise ValueError(
                f"metrics.modes measures Gaussian mixtures, data=8gaussians or data=mixture; {type(data).__name__} of "
                f"shape {data.shape} wants ~metrics.modes"
            )

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        assert isinstance(data, Mixture)
        share = mode_shares(generated, data)
        held_out = mode_shares(data.codec.decode(data.held_out.x_0), data)
        least = data.weights / 10
        covered, control = (float((part >= least).sum()) for part in (share, held_out))
        return [
            Measurement(
                "modes_covered",
                covered,
                better="higher",
                controls={"held_out": control},
                protocol={
                    "radius": "4 standard deviations",
                    "least_share": least.tolist() if least.unique().numel() > 1 else least[0].item(),
                },
                details={"share": share.tolist(), "outside": max(0.0, 1 - share.sum().item())},
            )
        ]


def check_points(data: Data) -> None:
    """Raise ValueError unless the data are points."""
    if len(data.shape) != 1:
        raise ValueError(
            f"metrics=points measures points of shape (D,); data of shape {data.shape} wants metrics=digits"
        )


def subset(data: Data, x_0: Tensor, n: int) -> Tensor:
    """n points (all, if there are fewer), decoded, in a fixed random order, float64."""
    index = torch.randperm(len(x_0), generator=generator(0, "mmd", len(x_0)))[:n]
    return data.codec.decode(x_0[index]).double()


def kernel(x: Tensor, y: Tensor, med: float) -> Tensor:
    """k(x_i, y_j), (N, M)."""
    squared = torch.cdist(x, y).square()
    return torch.stack([(-squared / (2 * (c * med) ** 2)).exp() for c in WIDTHS]).mean(0)


def mmd2(x: Tensor, y: Tensor, med: float) -> float:
    """The unbiased estimate for x (n, D) and y (m, D)."""
    xx, yy, xy = (
        torch.stack([kernel(part, b, med).sum() for part in a.split(1024)]).sum() for a, b in ((x, x), (y, y), (x, y))
    )
    return unbiased(xx, yy, xy, len(x), len(y)).item()


def splits(pool: Tensor, n: int, med: float) -> Tensor:
    """The unbiased estimate for random splits of the pool into n points and the rest, (200,)."""
    order = torch.rand(NULL_DRAWS, len(pool), generator=generator(0, "mmd-null")).argsort(dim=1)
    first = torch.zeros(NULL_DRAWS, len(pool), dtype=torch.float64).scatter(1, order[:, :n], 1.0)
    # The last row takes the whole pool.
    weights = torch.cat([first, torch.ones(1, len(pool), dtype=torch.float64)])
    sums = torch.cat([weights @ kernel(pool, part, med) for part in pool.split(1024)], dim=1)  # (201, N)
    xx = (sums[:-1] * first).sum(1)
    xy = sums[:-1].sum(1) - xx
    return unbiased(xx, sums[-1].sum() - xx - 2 * xy, xy, n, len(pool) - n)


def unbiased(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
    """MMD^2 from the sums of the three kernel matrices, whose diagonals, k(x, x) = 1, are left out."""
    return (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m)


def mode_shares(points: Tensor, data: Mixture) -> Tensor:
    """Share of points that belong to each mode: likeliest to come from it, and within 4 standard deviations, (K,)."""
    mode, distance = data.nearest(points)
    return mode[distance <= 4].bincount(minlength=len(data.means)).double() / len(points)
