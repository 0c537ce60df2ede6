"""Samplers as tests take them: every option without clipping, along a spacing of choice, and what it asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.guidance import DenoiserLike
from denoiselab.rng import Noise
from denoiselab.sampler import Rung, Sampler, Spacing, State
from denoiselab.schedule import Cosine, Schedule
from exact import OPTIONS, White, make, normals, solve, triangle

spacing_of = cache(lambda name: make("spacing", name))
schedule_of = cache(lambda name: make("schedule", name))


def option(name: str, spacing: str | Spacing = "log_snr", steps: int = 10, **arguments: Any) -> Sampler:
    """An option without clipping, along a spacing of choice."""
    arguments.setdefault("clip", None)
    levels = spacing_of(spacing) if isinstance(spacing, str) else spacing
    return make("sampler", name, spacing=levels, steps=steps, **arguments)


def addressed(n: int, *shape: int, seed: int = 0) -> Noise:
    return Noise(seed, range(n), shape, dtype=torch.float64)


class Counting:
    """A source of noise, or a denoiser, that counts its calls."""

    def __init__(self, inner: Callable[..., Tensor]):
        self.inner, self.calls = inner, 0

    def __call__(self, *arguments: Any, **cond: Any) -> Tensor:
        self.calls += 1
        return self.inner(*arguments, **cond)


class Impulses:
    """Row i of n is 1 at draw i and 0 at all others, the last row always 0.

    Where x_0_hat is a line in x_t a walk is one in its normals: the last row of its sample is the mean, the others less
    that are the coefficients of the normals, and the sum of their squares is the variance. Nothing is drawn.
    """

    def __init__(self, n: int):
        self.n, self.draw = n, 0

    def __call__(self) -> Tensor:
        self.draw += 1
        assert self.draw < self.n
        return (torch.arange(self.n) == self.draw - 1).double()[:, None]


def moments(x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of what a walk made of impulses."""
    mean = x[-1].item()
    return mean, (x - mean).square().sum().sqrt().item()


class Unsure:
    """A denoiser that also says a variance, v of the way between its bounds, as a network with a head for it does."""

    def __init__(self, inner: DenoiserLike, v: float = 0.5):
        self.inner, self.v = inner, v

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Outputs:
        x_0 = self.inner(x_t, alpha_t, sigma_t, **cond)
        return Outputs(x_0, torch.full_like(x_0, self.v))

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        return self.inner(x_t, alpha_t, sigma_t, **cond)


class Ends:
    """Where the flow ends that x_t is on: what a consistency model learns. In closed form for Gaussian data, else by
    Runge-Kutta."""

    def __init__(self, exact: Any, r_min: float = 0.002, steps: int = 20):
        self.exact, self.end, self.steps = exact, Rung(1.0, r_min), steps

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        t = Rung(*(level.flatten()[0].item() for level in (alpha_t, sigma_t)))
        if isinstance(self.exact, White):
            return self.exact.flow(x_t, t, self.end)
        return solve(self.exact, x_t, t, self.end, self.steps)


def asked_by(sampler: str, exact: Any) -> DenoiserLike:
    """What a sampler expects of a perfect network."""
    return Ends(exact) if sampler == "consistency" else Unsure(exact)


def is_stochastic(name: str) -> bool:
    source = Counting(addressed(1, 1))
    option(name, steps=3)(Unsure(White()), Cosine(), source)
    return source.calls > 1


STOCHASTIC = [name for name in OPTIONS["sampler"] if is_stochastic(name)]
DETERMINISTIC = [name for name in OPTIONS["sampler"] if name not in STOCHASTIC]
ORDERED = [name for name in DETERMINISTIC if option(name).order is not None]


def quantiles(n: int) -> Tensor:
    """n values (n, 1) that are as normal as can be."""
    return math.sqrt(2) * torch.erfinv(torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64)[1::2, None])


def reached(sampler: Sampler, denoiser: DenoiserLike, schedule: Schedule, x: Tensor) -> State:
    """The state at the last noisy level."""
    *_, state, _ = sampler.walk(denoiser, schedule, x)
    return state


def slopes(errors: list[float]) -> list[float]:
    """The orders that errors at N, 2N, 4N, .. fall with."""
    return [math.log2(before / after) for before, after in itertools.pairwise(errors)]


@cache
def flows() -> dict[tuple[str, str], Tensor]:
    """Where the flow of the triangle takes normals(16, 2) from the first to the last level, on every schedule along
    log_snr, and on ve and edm along karras: all of them solved together."""
    pairs = [*((name, "log_snr") for name in OPTIONS["schedule"]), ("ve", "karras"), ("edm", "karras")]
    ends = [option("ddim", spacing, 2).levels(schedule_of(name))[:2] for name, spacing in pairs]
    first, last = zip(*(pair for pair in ends for _ in range(16)), strict=True)
    x = torch.cat([start.sigma * normals(16, 2) for start, _ in ends])
    return dict(zip(pairs, solve(triangle(), x, first, last, 3000).split(16), strict=True))


class Straight(Schedule):
    """The straight path, from t = first (1 is pure noise) to the data."""

    def __init__(self, first: float = 1.0):
        super().__init__()
        self.first = first

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - self.first * t, self.first * t


def eps_of(exact: DenoiserLike, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """eps_hat of an exact denoiser."""
    level = (torch.full((len(x), 1), value, dtype=x.dtype) for value in (alpha, sigma))
    return (x - alpha * exact(x, *level)) / sigma
