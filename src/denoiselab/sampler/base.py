"""A sampler walks from pure noise to data along a list of noise levels.

A sampler is its one method ``step(denoise, x_t, t, s, schedule, noise, memory)`` from level t to level s. Its
arithmetic uses the levels as 0-d float64 numbers on the CPU: exact coefficients, no kernels and no waiting on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from denoiselab.guidance import DenoiserLike
from denoiselab.rng import From, Noise
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import Level, Schedule

Denoise = Callable[[Tensor, Level], Tensor]
"""x_0_hat at (x_t, level): the denoiser with its condition, clipping and call counting bound."""


class State(NamedTuple):
    """One moment of a walk: x_t at its level, and the estimate of x_0 made on the way there (None at first)."""

    x_t: Tensor
    level: Level
    x_0_hat: Tensor | None
    calls: int


class Sampler:
    """x_0 = sampler(denoiser, schedule, noise, **cond).

    Args:
        spacing: where the noise levels lie.
        steps: N >= 1, the number of noisy levels.
        clip: bound on |x_0_hat|, > 0 (1 for images in [-1, 1]); None leaves x_0_hat alone.
    """

    order: int = 1
    """Convergence order of the deterministic walk: the global error falls as N^-order."""

    def __init__(self, spacing: Spacing, steps: int = 20, clip: float | None = None):
        if steps < 1:
            raise ValueError(f"steps={steps}: need at least 1")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip}: need a number > 0, or null for no clipping")
        self.spacing, self.steps, self.clip = spacing, steps, clip

    @property
    def nfe(self) -> int:
        """Network calls of one walk."""
        return self.steps

    def step(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Level,
        s: Level,
        schedule: Schedule,
        noise: Callable[[], Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        """x_s from x_t.

        Args:
            denoise: ``denoise(x, level) -> x_0_hat``.
            t, s: levels of 0-d float64 tensors; s may be the clean level (1, 0).
            noise: gives every sample's next standard normal.
            memory: the walk's own dict, for multistep methods.
        """
        raise NotImplementedError

    def levels(self, schedule: Schedule) -> list[Level]:
        """The N noisy levels and the clean one, as 0-d float64 tensors on the CPU."""
        alpha, sigma = (value.cpu() for value in schedule(self.spacing(schedule, self.steps)))
        clean = Level(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
        return [*map(Level, alpha.unbind(), sigma.unbind()), clean]

    @torch.no_grad()
    def walk(self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor | Noise, **cond: Any) -> Iterator[State]:
        """The states of a walk, the first being x_T = sigma_T noise and the last the sample.

        Args:
            denoiser: any callable (x_t, alpha_t, sigma_t, **cond) -> x_0_hat, with levels of shape (B, 1, ...).
            schedule: the path; it need not be the one that was trained on.
            noise: the initial standard normal (B, ...), or a source of addressed normals.
        """
        source = From(noise) if isinstance(noise, Tensor) else noise
        calls, estimate = 0, None

        def denoise(x: Tensor, level: Level) -> Tensor:
            nonlocal calls, estimate
            estimate = denoiser(x, *level.like(x), **cond)
            if self.clip is not None:
                estimate = estimate.clamp(-self.clip, self.clip)
            calls += 1
            return estimate

        levels = self.levels(schedule)
        x_t = levels[0].sigma * source()
        memory: dict[str, Any] = {}
        yield State(x_t, levels[0], None, 0)
        for t, s in itertools.pairwise(levels):
            x_t = self.step(denoise, x_t, t, s, schedule, source, memory)
            yield State(x_t, s, estimate, calls)

    def __call__(self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor | Noise, **cond: Any) -> Tensor:
        """x_0, shaped like the noise; arguments as for walk.

        >>> import denoiselab
        >>> parts = denoiselab.build("schedule=cosine", "sampler=ddim", "sampler.steps=10")
        >>> def denoiser(x_t, alpha_t, sigma_t):                  # exact for data N(0, 1)
        ...     return alpha_t * x_t / (alpha_t**2 + sigma_t**2)
        >>> x_0 = parts.sampler(denoiser, parts.schedule, torch.randn(10_000, 1))
        >>> bool((x_0.std() - 1).abs() < 0.2)
        True
        """
        *_, last = self.walk(denoiser, schedule, noise, **cond)
        return last.x_t
