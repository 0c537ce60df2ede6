"""Training distributions of t, and how a batch is drawn from them.

A distribution is its one method ``icdf(u, schedule)``, the inverse of its cumulative distribution; a drawing of u
(independent or stratified) makes times from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


class Timesteps:
    """t and its importance weight for every sample of a micro-batch."""

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        """t at each cumulative probability u in [0, 1); float64 in, float64 out."""
        raise NotImplementedError

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        """n numbers in [0, 1), independent across samples, ranks and micro-batches."""
        g = generator(place.seed, "t", place.rank, place.micro, place.samples_seen, device=device)
        return torch.rand(n, generator=g, dtype=torch.float64, device=device)

    def __call__(self, n: int, schedule: Schedule, place: Place) -> tuple[Tensor, Tensor]:
        """(t, w): float32 times from schedule.earliest to 1, shape (n,), and weights on their losses, shape (n,).

        The weights are 1: the density that icdf draws from is itself the objective. A distribution that only
        reduces variance overrides this and returns 1/p(t) relative to uniform t.
        """
        t = self.icdf(self.uniforms(n, place, schedule.device), schedule).float().clamp_min(schedule.earliest)
        return t, torch.ones_like(t)


class Uniform(Timesteps):
    """t ~ U[0, 1), independent (Ho et al. 2020, arXiv:2006.11239, algorithm 1, with t made continuous)."""

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


class Stratified(Uniform):
    """One t in each of N equal strata of [0, 1), N being the whole global batch: uniform in the margin, with less
    variance between batches (as Kingma et al. 2021, arXiv:2107.00630, section I, who share one offset).

    The strata are dealt round-robin over ranks and micro-batches, so that each of them covers the whole range.
    The jitter comes from a generator that does not know the rank; every rank takes its own part of it.
    """

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        parts = place.world * place.accumulation
        part = place.micro * place.world + place.rank
        g = generator(place.seed, "t", place.samples_seen, device=device)
        jitter = torch.rand(n * parts, generator=g, dtype=torch.float64, device=device)
        return ((torch.arange(n * parts, device=device) + jitter) / (n * parts))[part::parts]
