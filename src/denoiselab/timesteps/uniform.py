"""Times that are uniform in the margin, independent or spread over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.rng import generator
from denoiselab.schedule import Schedule
from denoiselab.timesteps.base import Place, Timesteps


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
