"""Why a benchmark is not made, or not reported."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


class Unavailable(Exception):
    """What a part needs is not here; one line that says what."""


class Disagreement(RuntimeError):
    """Contenders that should compute the same do not: their times say nothing."""

    status = 1


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| over the largest |b|, or over 1 where that is larger; inf for different shapes."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def diffusers() -> ModuleType:
    """The package.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        import diffusers as package
    except ImportError:
        raise Unavailable("diffusers is not installed: pip install 'diffusers>=0.35'") from None
    return package
