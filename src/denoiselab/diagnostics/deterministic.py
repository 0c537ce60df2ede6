"""DDIM's deterministic walk, held so that it can be left and taken up again at any of its levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denoiselab.sampler import DDIM, Rung
from denoiselab.sampler.base import on_cpu
from denoiselab.sampler.ddim import ddim

if TYPE_CHECKING:
    from denoiselab.diagnostics.subject import Subject

Denoise = Callable[[Tensor, Rung], Tensor]
"""x_0_hat of x_t at a level."""


AT_ONCE = 256
"""Samples per network call."""


class Deterministic:
    """x_s = alpha_s x_0_hat + sigma_s eps_hat from level k to level k + 1, k = 0 .. N - 1; level N is clean.

    Args:
        subject: whose spacing and schedule give the levels.
        steps: N.
    """

    def __init__(self, subject: Subject, steps: int):
        sampler = DDIM(subject.parts.spacing, steps)
        schedule = on_cpu(subject.schedule)
        self.levels = sampler.levels(schedule)
        self.t = [*torch.as_tensor(sampler.spacing(schedule, steps)).flatten().tolist(), 0.0]
        """The time of each level."""

    def on(self, denoise: Denoise, x: Tensor, first: int, last: int) -> Tensor:
        """x at level ``last`` of the walk that is at x at level ``first``."""
        for t, s in zip(self.levels[first:last], self.levels[first + 1 : last + 1], strict=True):
            x = ddim(x, denoise(x, t), t, s)
        return x

    def protocol(self) -> dict[str, Any]:
        """For ``Subject.protocol``."""
        return {"sampler": {"_target_": "denoiselab.sampler.DDIM", "steps": len(self.levels) - 1}}
