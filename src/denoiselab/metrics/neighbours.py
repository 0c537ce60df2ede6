"""Are samples copies of training data?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.space import Space, decoded, positions, space_of

SHARE = 0.01
"""Of new real samples that counts as near."""


class NearestTraining(Metric):
    """nearest_training_ratio: how near samples are to training samples, in units of how near new real ones are.

    median_i min_j |sample_i - train_j| over the same median for the held-out samples in place of the generated ones,
    with L2 distances in pixels (values in [-1, 1]). About 1: as new as real images. Well below 1: copies, or blurred
    averages. Well above 1: unlike any. No direction is better, so read it beside precision.

    Control ``held_out_median``: the denominator. Details: ``generated_median``, the numerator; ``near_share``, the
    share of samples nearer than the 1st percentile of the held-out distances, 0.01 for new real images.

    The training set is read a part at a time; of more than 50,000 samples a fixed random subset is looked at, which
    ``n_real`` says, and a copy of another sample is then not seen.
    """

    def check(self, data: Data) -> None:
        if len(data.shape) != 3:
            raise ValueError(f"metrics=digits measures images; data of shape {data.shape} wants metrics=points")

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        pool = Pool(data, space_of(data, "pixels"))
        held_out = data.codec.decode(data.held_out.draw(len(data.held_out))["x_0"])
        both = pool.nearest(torch.cat([generated, held_out])).distance
        samples, real = both[: len(generated)], both[len(generated) :]
        median, control = samples.median().item(), real.median().item()
        return [
            Measurement(
                "nearest_training_ratio",
                median / control,
                better="none",
                controls={"held_out_median": control},
                protocol={
                    "distance": "L2 over pixels in [-1, 1]",
                    "shape": list(data.shape),
                    "n_real": len(pool.index),
                    "n_held_out": len(real),
                },
                details={
                    "generated_median": median,
                    "near_share": (samples < real.quantile(SHARE)).double().mean().item(),
                },
            )
        ]


class Nearest(NamedTuple):
    """The nearest training sample of each of N."""

    distance: Tensor
    """(N,)."""
    position: Tensor
    """In the training set, (N,)."""


class Pool:
    """Training samples that others are compared with; read again at each call, a part at a time.

    Args:
        data: the data set.
        space: where distances are measured.
    """

    def __init__(self, data: Data, space: Space):
        self.data, self.space, self.index = data, space, positions(data.train)

    def nearest(self, samples: Tensor, tell: Callable[[int], object] = lambda done: None) -> Nearest:
        """The nearest training sample of each sample (N, ...), by L2 distance in the space.

        The nearest is found by |a|^2 - 2 a b + |b|^2, which is quick, in float64; its distance is then computed from
        the difference, so that it is exactly 0 between equal samples.

        Args:
            tell: is told how many training samples each part added.
        """
        rows = self.space.vectors(samples)
        squares = torch.full((len(rows),), math.inf, dtype=torch.float64)
        position = torch.zeros(len(rows), dtype=torch.int64)
        best, start = torch.empty_like(rows), 0
        for part, _ in decoded(self.data.train, self.data, self.index):
            real = self.space.vectors(part)
            found = (real.square().sum(1) - 2 * rows @ real.T).min(1)  # less |a|^2, which is the sample's own
            nearer = found.values < squares
            squares[nearer], best[nearer] = found.values[nearer], real[found.indices[nearer]]
            position[nearer] = self.index[start + found.indices[nearer]]
            start += len(part)
            tell(len(part))
        return Nearest((rows - best).norm(dim=1), position)


class Copies(NamedTuple):
    """A test of whether too many samples are near to training samples."""

    threshold: float
    """What counts as near: the r-th smallest of the m held-out distances, r the integer part of 0.01 m, at least 1."""
    share: float
    """Of the samples that are nearer."""
    expected: float
    """The same of new real samples, r/(m + 1)."""
    p: float
    """P(as many or more) if samples are as new as held-out ones."""


def copies(distance: Tensor, held_out: Tensor) -> Copies:
    """Are more of n samples nearer than the 1st percentile of the held-out distances than of new real samples?

    If both are drawn from one distribution, the probability of being nearer than the r-th smallest of m is
    Beta(r, m + 1 - r), so the count is beta-binomial. A binomial test at 0.01 would take the percentile, which few
    held-out samples say, for known, and see copies where there are none.

    Args:
        distance: (n,), of samples to their nearest training samples.
        held_out: (m,), of held-out ones.
    """
    from scipy.special import logsumexp
    from scipy.stats import betabinom

    n, m = len(distance), len(held_out)
    r = max(1, int(SHARE * m))
    threshold = held_out.sort().values[r - 1]
    near = int((distance < threshold).sum())
    tail = torch.arange(near, n + 1).numpy()  # summed term by term: one minus the rest would lose small values
    log_p: Any = logsumexp(betabinom.logpmf(tail, n, r, m + 1 - r))
    p = math.exp(min(0.0, float(log_p)))
    return Copies(threshold.item(), near / n, r / (m + 1), p)
