"""Means with their uncertainty, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

LONGEST = 40
"""Characters of a setting's value; hashes and paths are shortened in the middle."""


def mean_ci(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95% confidence interval, Student's t; None of it for a single value.

    >>> mean_ci([1.0, 2.0, 3.0])                     # 4.303 (2 degrees of freedom) / sqrt(3)
    (2.0, 2.484...)
    >>> mean_ci([1.0])
    (1.0, None)
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, None
    if min(values) == max(values):
        return mean, 0.0  # not the rounding error of the mean
    return mean, float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))


def number(value: float | None, digits: int = 4) -> str:
    """A measured number at ``digits`` significant digits; counts in full.

    >>> number(0.9), number(12.3456), number(1000), number(0.00001234), number(None)
    ('0.9000', '12.35', '1000', '1.234e-05', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    if 10**digits <= abs(value) < 10**7:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def plain(value: Any) -> str:
    """A setting as people write it.

    >>> plain(0.001), plain(True), plain(None), plain([1, 2]), plain("v")
    ('0.001', 'true', '–', '[1, 2]', 'v')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[:12]}…{text[-12:]}"
