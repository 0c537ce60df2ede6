"""How varied samples of one class are, beside real ones; how many values are at the end of their range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Metric
from denoiselab.metrics.features import Features
from denoiselab.metrics.space import Space, space_of

ENOUGH = 10
"""Samples of a class for each dimension, in both sets, where a covariance's narrowest direction can be told."""


FIXED = 1e-9
"""Of the largest variance: directions of less are those in which real samples do not vary, such as pixels that are
always black."""


class Spread(NamedTuple):
    """Standard deviations of samples within their class, over those of real samples."""

    spread: float
    """Over all directions: sqrt(sum_k tr C_k / sum_k tr R_k)."""
    narrowest: float | None
    """In the direction in which a class is narrowest: sqrt(mean over k of the least eigenvalue of R_k^-1 C_k); None
    where a class has fewer than 10 samples for each dimension. Finite sets make it too small: of just so many,
    1 is read as 0.85 in 2 dimensions and as 0.64 in 64."""


def within_class(rows: Tensor, label: Tensor, real: Tensor, real_label: Tensor) -> Spread:
    """The spread of samples (N, D) with labels (N,), C_k being the covariance of class k, beside real ones (M, D), R_k
    their covariance. Classes of fewer than 2 samples in either set are left out.

    >>> cloud = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> label = torch.zeros(1000, dtype=torch.long)
    >>> found = within_class(cloud * torch.tensor([1.0, 0.5]), label, cloud, label)
    >>> print(f"{found.spread:.2f} {found.narrowest:.2f}")
    0.78 0.50
    """
    d, made, given, least = rows.shape[1], [], [], []
    enough = True
    for k in real_label.unique().tolist():
        a, b = rows[label == k].double(), real[real_label == k].double()
        if min(len(a), len(b)) < 2:
            continue
        made.append(a.var(0).sum())
        given.append(b.var(0).sum())
        if enough := enough and min(len(a), len(b)) >= ENOUGH * d:
            power, axes = torch.linalg.eigh(torch.atleast_2d(torch.cov(b.T)))
            varies = power > FIXED * power[-1]
            white = (a - a.mean(0)) @ axes[:, varies] / power[varies].sqrt()
            least.append(torch.linalg.eigvalsh(white.T @ white / (len(a) - 1))[0])
    if not made:
        raise ValueError("n: no class has two samples, in both sets; need more samples for a spread within classes")
    everything = (torch.stack(made).sum() / torch.stack(given).sum()).sqrt().item()
    return Spread(everything, torch.stack(least).mean().clamp_min(0).sqrt().item() if enough else None)


def space_for(metrics: Mapping[str, Metric], data: Data) -> Space:
    """The features that a metric measures in, of the first that has some; else what ``space_of`` says."""
    for metric in metrics.values():
        features = getattr(metric, "features", None)
        if isinstance(features, Features):
            return Space(features, {"space": "features", **features.protocol})
    return space_of(data)


def saturation(images: Tensor) -> float:
    """The share of values beyond 0.99 on either side, images (N, C, H, W) being in [-1, 1]."""
    return (images.abs() > 0.99).double().mean().item()


def chroma(images: Tensor) -> float:
    """The mean over pixels of (max - min)/2 of the three colours: 0 of grey images, 1 of pure colours."""
    return ((images.amax(1) - images.amin(1)) / 2).double().mean().item()
