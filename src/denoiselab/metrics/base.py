"""What a metric is: generated samples and a data set in, measurements that carry their protocol out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from denoiselab.data.base import Data


@dataclass
class Measurement:
    """One number, and all that is needed to know what it means."""

    name: str
    value: float
    better: str
    """lower, higher, or none where no direction is better."""
    controls: dict[str, float] = field(default_factory=dict)
    """What the same measurement gives on real data, or on what a simpler method makes, by name: a floor, a ceiling."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """What the number depends on beside the samples: feature extractor and hash, k, implementation."""
    details: dict[str, Any] = field(default_factory=dict)
    """Parts of it, for instance per class; numbers and lists of numbers."""


class Metric:
    """Measures generated samples against a data set; a subclass writes ``measure``."""

    least: int = 1
    """The smallest number of samples that it can measure."""

    paired: ClassVar[bool] = False
    """Whether it compares generated[i] with the i-th image of ``data.held_out.draw(len(generated))``, of which sample i
    was made. Such a metric is refused where samples are made of noise alone."""

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        """Measurements of decoded samples.

        Args:
            generated: (N, ...) float32 on the CPU, images in [-1, 1] or points in their own units.
            label: the class that each sample was asked for, (N,), or None.
            data: the real samples.
        """
        raise NotImplementedError

    def check(self, data: Data) -> None:
        """Raise ValueError, in one line, if this data set cannot be measured so."""
