"""Noise levels where a loss is large."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.curve import Curve
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import Schedule


class LossDensity(Spacing):
    """N times between which a loss L(t) has equal integrals: share 1 - i/N of it lies before the i-th, i = 0..N-1.

    A constant loss is the trailing spacing of continuous time. That steps should go where the loss is large is a
    hypothesis to be measured against the other spacings, not a result. Times before ``schedule.earliest`` do not
    count.

    Args:
        curve: a CSV with columns t and value, such a JSON file or its text, or a run (see ``Curve.load``); or a
            Curve.
        panel: of a run, which loss: eps, x_0 or v.
    """

    def __init__(self, curve: Curve | str, panel: str = "eps"):
        self.curve = curve if isinstance(curve, Curve) else Curve.load(curve, panel)

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        before = self.curve.cumulative(torch.tensor([schedule.earliest], dtype=torch.float64)) / self.curve.total
        share = 1 - torch.arange(steps, dtype=torch.float64) / steps
        times = self.curve.inverse(before + (1 - before) * share)
        times[0] = 1.0
        return times
