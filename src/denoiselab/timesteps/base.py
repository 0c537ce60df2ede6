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
    """t and its importance weight for every sample of a micro-batch.

    Args:
        steps: T >= 2 draws no other times than index/(T - 1), index = floor(T t), so that uniform t is uniform on the
            T points of a discrete-time schedule; None for any t.
    """

    learns: bool = False
    """Whether training tells it of its losses, by update."""

    def __init__(self, steps: int | None = None):
        super().__init__()
        if steps is not None and not (isinstance(steps, int) and steps >= 2):
            raise ValueError(f"steps={steps}: need a whole number >= 2, or null for any t")
        self.steps = steps

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError where it cannot draw on this schedule."""

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        """t at each cumulative probability u in [0, 1); float64 in, float64 out."""
        raise NotImplementedError

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Weights on the losses at times t, float64 in and out.

        1, unless overridden: the density that icdf draws from is itself the objective. A distribution that only
        reduces variance returns 1/p(t) relative to uniform t. t is what icdf drew, before it moves to one of
        ``steps``: that keeps such weights right, since the point's probability is the integral of p over its cell.
        """
        return torch.ones_like(t)

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        """n numbers in [0, 1), independent across samples, ranks and micro-batches."""
        g = generator(place.seed, "t", place.rank, place.micro, place.samples_seen, device=device)
        return torch.rand(n, generator=g, dtype=torch.float64, device=device)

    def forward(self, n: int, schedule: Schedule, place: Place) -> tuple[Tensor, Tensor]:
        """(t, w): float32 times from schedule.earliest to 1, shape (n,), and weights on their losses, shape (n,)."""
        t = self.icdf(self.uniforms(n, place, schedule.device), schedule)
        w = self.weights(t, schedule)
        if self.steps is not None:
            t = nearest_below(t, self.steps)
        return t.float().clamp_min(schedule.earliest), w.float()

    def advance(self, samples_seen: int) -> None:
        """Called before each optimizer step, for what follows the progress of training."""

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the times and losses of one optimizer step's global batch, float32 of shape (B,), the same on every
        rank and in the same order. Only called if ``learns``; what is kept is in persistent buffers."""


def cell(t: Tensor, count: int) -> Tensor:
    """floor(count t) among 0 .. count - 1; for t = index/(count - 1) that is index."""
    return (t.double() * count).long().clamp(0, count - 1)


def nearest_below(t: Tensor, points: int) -> Tensor:
    """index/(T - 1), index = floor(T t), of T points."""
    return cell(t, points).double() / (points - 1)


def histogram_icdf(u: Tensor, edges: Tensor, p: Tensor) -> Tensor:
    """The inverse cumulative distribution at u of a density that is constant between edges.

    Args:
        u: in [0, 1].
        edges: (n + 1,), rising.
        p: (n,), probabilities between them up to a common factor; those that are 0 are never drawn.
    """
    cdf = p.cumsum(0)
    cdf = torch.cat([cdf.new_zeros(1), cdf / cdf[-1]])
    u = u.clamp_max(1 - 2**-53)
    i = torch.searchsorted(cdf[1:], u, right=True)
    return torch.lerp(edges[i], edges[i + 1], (u - cdf[i]) / (cdf[i + 1] - cdf[i]))
