"""A sampler walks from pure noise to data along a list of noise levels.

A sampler is its one method ``step(denoise, x_t, t, s, schedule, noise, memory)`` from level t to level s. The levels of
a walk are Python floats, so that a step's coefficients are exact and cost neither kernels nor waiting on a GPU.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from denoiselab.denoiser import Denoiser, Outputs
from denoiselab.guidance import DenoiserLike, outputs_of
from denoiselab.rng import From, Noise
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import RATIO, Level, Schedule


class Rung(NamedTuple):
    """One noise level of a walk, as two Python floats.

    >>> Rung(0.5, 0.25).ratio
    0.5
    """

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma/alpha: the level's standard deviation where alpha is 1."""
        return self.sigma / self.alpha

    @property
    def flow_time(self) -> float:
        """sigma/(alpha + sigma): the time of the straight path from data (0) to noise (1)."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def half_log_snr(self) -> float:
        """log(alpha/sigma), the lambda of the solver papers; at the clean level it is held at log(1e6)."""
        return math.log(self.alpha / max(self.sigma, self.alpha / RATIO))

    def like(self, x: Tensor) -> Level:
        """The level once per sample: shape (B, 1, ...), dtype and device of x."""
        shape = (len(x),) + (1,) * (x.ndim - 1)
        return Level(*(torch.full(shape, value, dtype=x.dtype, device=x.device) for value in self))


NOISE = 1e3
"""sigma/alpha beyond which x_t is noise: eps_hat, in float32, says nothing of x_0 any more."""

CLEAN = Rung(1.0, 0.0)
"""The level that every walk ends at."""


def on(schedule: Schedule, half_log_snr: float) -> Rung:
    """The rung of a schedule on the CPU with that log(alpha/sigma)."""
    return Rung(*(float(value) for value in schedule.at(torch.tensor(2 * half_log_snr, dtype=torch.float64))))


class State(NamedTuple):
    """One moment of a walk: x_t at its level, and the estimate of x_0 made on the way there (None at first)."""

    x_t: Tensor
    level: Rung
    x_0_hat: Tensor | None
    calls: int


class Denoise:
    """x_0_hat at (x, rung): a denoiser with its condition, clipping and call counting bound."""

    def __init__(self, denoiser: DenoiserLike, clip: float | None = None, **cond: Any):
        self.denoiser, self.clip, self.cond = denoiser, clip, cond
        self.calls = 0
        self.x_0_hat: Tensor | None = None
        """The latest estimate."""

    def __call__(self, x: Tensor, rung: Rung) -> Tensor:
        return self._noted(self.denoiser(x, *rung.like(x), **self.cond))

    def outputs(self, x: Tensor, rung: Rung) -> Outputs:
        """Everything the denoiser says, x_0_hat clipped."""
        found = outputs_of(self.denoiser, x, *rung.like(x), **self.cond)
        return found._replace(x_0=self._noted(found.x_0))

    def _noted(self, x_0_hat: Tensor) -> Tensor:
        self.calls += 1
        self.x_0_hat = x_0_hat if self.clip is None else x_0_hat.clamp(-self.clip, self.clip)
        return self.x_0_hat


class Sampler:
    """x_0 = sampler(denoiser, schedule, noise, **cond).

    Args:
        spacing: where the noise levels lie.
        steps: N >= 1, the number of noisy levels.
        clip: bound on |x_0_hat|, > 0 (1 for images in [-1, 1]); None leaves x_0_hat alone.
    """

    order: float | None = 1
    """Convergence order of the deterministic walk, a multistep method's once it is under way: the global error falls as
    N^-order. None where N does not set the accuracy."""

    def __init__(self, spacing: Spacing, steps: int = 20, clip: float | None = None):
        if steps < 1:
            raise ValueError(f"steps={steps}: need at least 1")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip}: need a number > 0, or null for no clipping")
        self.spacing, self.steps, self.clip = spacing, steps, clip

    @property
    def nfe(self) -> int | None:
        """Network calls of one walk; None where only the walk itself can tell."""
        return self.steps

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a denoiser that this sampler cannot use.

        Raises:
            ValueError: saying what it lacks.
        """

    def step(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Rung,
        s: Rung,
        schedule: Schedule,
        noise: Callable[[], Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        """x_s from x_t.

        Args:
            denoise: ``denoise(x, rung) -> x_0_hat``.
            t, s: levels; s may be the clean one (1, 0), and t.alpha is at least t.sigma/1e6.
            schedule: the path, on the CPU.
            noise: gives every sample's next standard normal.
            memory: the walk's own dict, for multistep methods.
        """
        raise NotImplementedError

    def levels(self, schedule: Schedule) -> list[Rung]:
        """The N noisy levels and the clean one. At pure noise alpha is held at sigma/1e6, as in log_snr."""
        alpha, sigma = (value.tolist() for value in schedule(self.spacing(schedule, self.steps)))
        return [*(Rung(max(a, b / RATIO), b) for a, b in zip(alpha, sigma, strict=True)), CLEAN]

    @torch.no_grad()
    def walk(self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor | Noise, **cond: Any) -> Iterator[State]:
        """The states of a walk, the first being x_T = sigma_T noise and the last the sample.

        Args:
            denoiser: any callable (x_t, alpha_t, sigma_t, **cond) -> x_0_hat, with levels of shape (B, 1, ...).
            schedule: the path; it need not be the one that was trained on.
            noise: the initial standard normal (B, ...), or a source of addressed normals.
        """
        source = From(noise) if isinstance(noise, Tensor) else noise
        schedule = schedule if schedule.device.type == "cpu" else copy.deepcopy(schedule).cpu()
        denoise = Denoise(denoiser, self.clip, **cond)
        levels = self.levels(schedule)
        x_t = levels[0].sigma * source()
        memory: dict[str, Any] = {}
        yield State(x_t, levels[0], None, 0)
        for t, s in itertools.pairwise(levels):
            x_t = self.step(denoise, x_t, t, s, schedule, source, memory)
            yield State(x_t, s, denoise.x_0_hat, denoise.calls)

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
