"""Times that are uniform in the margin, independent or spread over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.rng import generator
from denoiselab.schedule import Schedule
from denoiselab.timesteps.base import Place, Timesteps, nearest_below


class Uniform(Timesteps):
    """t ~ U[0, 1), independent (Ho et al. 2020, arXiv:2006.11239, algorithm 1, with t made continuous)."""

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


class Stratified(Uniform):
    """One t in each of N equal strata of [0, 1), N being the whole global batch: uniform in the margin, with less
    variance between batches (as Kingma et al. 2021, arXiv:2107.00630, section I, who share one offset).

    The strata are dealt round-robin over ranks and micro-batches, so that each of them covers the whole range.
    The jitter comes from a generator that does not know the rank; every rank takes its own part of it.
    It takes away the part of a batch's variance that lies between times, not that at equal times.
    """

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        parts = place.world * place.accumulation
        part = place.micro * place.world + place.rank
        g = generator(place.seed, "t", place.samples_seen, device=device)
        jitter = torch.rand(n * parts, generator=g, dtype=torch.float64, device=device)
        u = (torch.arange(n * parts, device=device) + jitter) / (n * parts)
        return u[part::parts].clamp_max(1 - 2**-53)


class LowDiscrepancy(Uniform):
    """t_i = (u + i/N) mod 1, i = 0 .. N - 1, with one u for the whole global batch of N (Kingma et al. 2021,
    arXiv:2107.00630, section I.1): evenly spaced times with a random offset.

    Dealt round-robin over ranks and micro-batches. The variance of a batch's mean of L(t) is about
    (L(1) - L(0))^2/(12 N^2), against Stratified's mean L'^2/(12 N^3): more, unless L has equal ends.
    """

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        parts = place.world * place.accumulation
        part = place.micro * place.world + place.rank
        g = generator(place.seed, "t", place.samples_seen, device=device)
        offset = torch.rand(1, generator=g, dtype=torch.float64, device=device)
        return ((offset + torch.arange(n * parts, device=device) / (n * parts)) % 1)[part::parts]


class Antithetic(Uniform):
    """Pairs (u, 1 - u) of independent u, consecutive in the global batch: uniform in the margin, and what is linear
    in t does not vary between batches.

    A micro-batch of odd size shares a pair with the next one; a global batch of odd size ends with an unpaired u.
    """

    def uniforms(self, n: int, place: Place, device: torch.device) -> Tensor:
        parts = place.world * place.accumulation
        part = place.micro * place.world + place.rank
        g = generator(place.seed, "t", place.samples_seen, device=device)
        u = torch.rand((n * parts + 1) // 2, generator=g, dtype=torch.float64, device=device)
        pairs = torch.stack([u, (1 - u).clamp_max(1 - 2**-53)], dim=1).flatten()
        return pairs[part * n : (part + 1) * n]


class Discrete(Stratified):
    """Uniform on the T points of a discrete-time schedule, t = (index - 1)/(T - 1), index = 1 .. T, and nowhere
    between them (Ho et al. 2020, arXiv:2006.11239, algorithm 1); stratified over the global batch."""

    def __init__(self) -> None:
        super().__init__()

    def check(self, schedule: Schedule) -> None:
        self._points(schedule)

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return nearest_below(u, self._points(schedule))

    @staticmethod
    def _points(schedule: Schedule) -> int:
        if schedule.points is None:
            raise ValueError(
                f"timesteps=discrete: {type(schedule).__name__} has no points of its own; take a schedule that is a "
                "table, or another option with timesteps.steps=1000"
            )
        return schedule.points
