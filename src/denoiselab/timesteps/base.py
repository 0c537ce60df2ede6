"""Training distributions of t, and how a batch is drawn from them.

A distribution is its one method ``icdf(u, schedule)``, the inverse of its cumulative distribution; a drawing of u
(independent or stratified) makes times from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.buffers import ExactBuffers
from denoiselab.rng import generator
from denoiselab.schedule import Schedule


class Place(NamedTuple):
    """Where in a run a micro-batch is: what its random draws are addressed by."""

    seed: int
    samples_seen: int
    """Samples the whole run had consumed before this optimizer step."""
    rank: int = 0
    world: int = 1
    micro: int = 0
    accumulation: int = 1


class Timesteps(ExactBuffers):
    """t and its importance weight for every sample of a micro-batch."""

    learns: bool = False
    """Whether training tells it of its losses, by update."""

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        """t at each cumulative probability u in [0, 1); float64 in, float64 out."""
        raise NotImplementedError

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Weights on the losses at times t, float64 in and out.

        1, unless overridden: the density that icdf draws from is itself the objective. A distribution that only
        reduces variance returns 1/p(t) relative to uniform t.
        """
        return torch.ones_like(t)

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        """n numbers in [0, 1), independent across samples, ranks and micro-batches."""
        g = generator(place.seed, "t", place.rank, place.micro, place.samples_seen, device=device)
        return torch.rand(n, generator=g, dtype=torch.float64, device=device)

    def forward(self, n: int, schedule: Schedule, place: Place) -> tuple[Tensor, Tensor]:
        """(t, w): float32 times from schedule.earliest to 1, shape (n,), and weights on their losses, shape (n,)."""
        t = self.icdf(self.uniforms(n, place, schedule.device), schedule)
        return t.float().clamp_min(schedule.earliest), self.weights(t, schedule).float()

    def advance(self, samples_seen: int) -> None:
        """Called before each optimizer step, for what follows the progress of training."""

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the times and losses of one optimizer step's global batch, float32 of shape (B,), the same on every
        rank and in the same order. Only called if ``learns``; what is kept is in persistent buffers."""
