"""Paired differences over seeds, and significance where several are tested.

Runs of one seed share the order of samples, the noise and, where the network is the same, the initial weights. What a
seed does to both arms cancels in their difference; the distance of two means carries it twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
"""Of significance, after adjustment for the number of tests."""

ROUNDING = 1e-9
"""Differences that vary by less than this share of the values differ by rounding only."""

Draws = Mapping[str, Mapping[str, float]]
"""Values of a measurement by seed, and by seed of the evaluation."""


@dataclass
class Difference:
    """The mean of value minus reference over common seeds."""

    seeds: list[str]
    values: list[float]
    means: tuple[float, float]
    """Of both over those seeds; their difference is ``mean``."""
    mean: float
    half: float | None = None
    """Half the width of its 95% interval; None where there is no test."""
    p: float | None = None
    """Two-sided, of no difference; None where there is no test."""
    untested: str = ""
    """Why there is no test."""
    adjusted: float | None = None
    """p after adjustment for the tests beside it."""

    @property
    def n(self) -> int:
        return len(self.seeds)


def difference(values: Draws, reference: Draws) -> Difference | None:
    """Paired t: mean d ± t(n - 1; 0.975) s_d / sqrt(n) over the n common seeds, p of t = mean d sqrt(n) / s_d.

    Within a seed, evaluations with the same seed of the noise are compared where there are any, and their mean is the
    seed's value: drawing samples again from one run is no new run.

    Where the differences do not vary, or where there is only one, nothing is known of their spread and nothing is
    tested: t would be infinite.

    Args:
        values, reference: of a measurement, finite, by seed and seed of the evaluation.

    Returns:
        None if no seed is common.
    """
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    pairs = np.array([_pair(values[seed], reference[seed]) for seed in seeds])
    found = pairs[:, 0] - pairs[:, 1]
    n, mean = len(seeds), float(found.mean())
    result = Difference(seeds, found.tolist(), (float(pairs[:, 0].mean()), float(pairs[:, 1].mean())), mean)
    least = ROUNDING * float(np.abs(pairs).max())
    if n < 2:
        result.untested = "one common seed"
    elif (spread := float(found.std(ddof=1))) <= least:
        result.untested = "the values are the same" if abs(mean) <= least else "the differences do not vary"
    else:
        error = spread / math.sqrt(n)
        result.half = float(stdtrit(n - 1, 0.975)) * error
        result.p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return result


def _pair(values: Mapping[str, float], reference: Mapping[str, float]) -> tuple[float, float]:
    both = [seed for seed in values if seed in reference]
    pairs = (values, reference) if not both else [{seed: side[seed] for seed in both} for side in (values, reference)]
    a, b = (math.fsum(side.values()) / len(side) for side in pairs)
    return a, b


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted so that the chance of one false discovery among all stays below the level, however they
    depend on each other: the k-th smallest of m, times m - k + 1, and no smaller than the one before (Holm 1979).

    Args:
        ps: in [0, 1]; None for a test that is planned and not made yet, which counts among the m.

    >>> holm([0.01, 0.04, None, 0.02])
    [0.04, 0.08, None, 0.06]
    """
    adjusted: list[float | None] = [None] * len(ps)
    last = 0.0
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    for rank, (p, i) in enumerate(known):
        last = max(last, min(1.0, p * (len(ps) - rank)))
        adjusted[i] = last
    return adjusted
