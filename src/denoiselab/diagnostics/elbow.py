"""Curves of distances: where they turn, and what real data reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from denoiselab.rng import generator

DRAWS = 2000
"""Bootstrap samples of the repeats."""


class Best(NamedTuple):
    """The scale at which a distance is least."""

    scale: float
    low: float | None
    """2.5 % and 97.5 % of what resampled repeats say; None of one repeat."""
    high: float | None
    at_end: bool
    """Whether it is the first or the last of the scales, so that the curve may turn beyond them."""


def best_scale(scales: Sequence[float], values: Sequence[Sequence[float]]) -> Best:
    """argmin over s of the mean over repeats of d(s), the elbow of the U that a distance over guidance scales is: lower
    scales leave classes blurred, higher ones narrow them.

    The interval is a percentile bootstrap over repeats (Efron and Tibshirani 1993, An Introduction to the Bootstrap,
    chapter 13): whole curves are drawn again, with replacement, since one repeat's noise is the same at every scale. It
    knows no scale between those that were measured, and of a few repeats it is too short.

    Args:
        scales: S >= 1 different ones, in any order.
        values: the distance, R x S: a row per repeat.

    >>> w = [0, 0.1, 0.3, 1, 4]   # Ho and Salimans 2022, arXiv:2207.12598, table 1: FID on ImageNet 64 x 64
    >>> best_scale([1 + w for w in w], [[1.80, 1.55, 3.03, 12.6, 26.2]])
    Best(scale=1.1, low=None, high=None, at_end=False)
    """
    curves = torch.as_tensor(values, dtype=torch.float64)  # (R, S)
    order = sorted(range(len(scales)), key=lambda k: scales[k])
    curves = curves[:, order]
    ordered = [float(scales[k]) for k in order]
    best = int(curves.mean(0).argmin())
    low = high = None
    repeats = len(curves)
    if repeats > 1:
        drawn = torch.randint(repeats, (DRAWS, repeats), generator=generator(0, "elbow"))
        found = torch.tensor(ordered, dtype=torch.float64)[curves[drawn].mean(1).argmin(1)]
        low, high = (float(found.quantile(q, interpolation="nearest")) for q in (0.025, 0.975))
    return Best(ordered[best], low, high, best in (0, len(ordered) - 1))


def floor(controls: dict[str, float]) -> tuple[float, float] | None:
    """Between what a distance of real data lies: the mean of a null or floor, and what 95 % or two standard deviations
    reach on both sides; None where its controls do not tell."""
    if "null_95" in controls:
        middle, reach = controls["null_mean"], controls["null_95"] - controls["null_mean"]
    elif "null_std" in controls:
        middle, reach = controls["null_mean"], 2 * controls["null_std"]
    elif "floor" in controls:
        middle, reach = controls["floor"], 2 * controls.get("floor_std", 0.0)
    else:
        return None
    return middle - reach, middle + reach
