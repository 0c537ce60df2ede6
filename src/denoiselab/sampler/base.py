"""A sampler walks from pure noise to data along a list of noise levels.

A sampler is its one method ``step(walk, x_t, t, s)`` from noisy level t to noisy level s. The levels of a walk are
Python floats, so that a step's coefficients are exact and cost neither kernels nor waiting on a GPU.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from denoiselab.denoiser import Denoiser, Outputs
from denoiselab.guidance import DenoiserLike, outputs_of
from denoiselab.rng import From
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


def rungs(levels: Level) -> list[Rung]:
    """Levels as rungs. At pure noise alpha is held at sigma/1e6, as in log_snr, so that no step divides by zero."""
    alpha, sigma = (value.flatten().tolist() for value in levels)
    return [Rung(max(a, b / RATIO), b) for a, b in zip(alpha, sigma, strict=True)]


def on_cpu(schedule: Schedule) -> Schedule:
    """The schedule where its levels are read as floats without waiting for a GPU: itself, or a copy."""
    return schedule if schedule.device.type == "cpu" else copy.deepcopy(schedule).cpu()


class State(NamedTuple):
    """One moment of a walk: x_t at its level, and the estimate of x_0 made on the way there (None at first)."""

    x_t: Tensor
    level: Rung
    x_0_hat: Tensor | None
    calls: int


def no_noise() -> Tensor:
    raise RuntimeError("this walk was given no noise")


class Walk:
    """What the steps of one walk share: the network with its condition, the path, the noise, and a memory.

    Args:
        denoiser: any callable (x_t, alpha_t, sigma_t, **cond) -> x_0_hat.
        schedule: the path, on any device.
        noise: gives every sample's next standard normal; without it, no step may ask for any.
        clip: bound on |x_0_hat|; None for none.
        cond: what the denoiser is told.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Callable[[], Tensor] = no_noise,
        clip: float | None = None,
        /,
        **cond: Any,
    ):
        self.denoiser, self.clip, self.cond = denoiser, clip, cond
        self.schedule = on_cpu(schedule)
        """The path, on the CPU."""
        self.noise = noise
        """``noise()`` is every sample's next standard normal, shaped like x."""
        self.memory: dict[str, Any] = {}
        """The sampler's own, for what it must remember from step to step."""
        self.calls = 0
        """Network calls so far."""
        self.x_0_hat: Tensor | None = None
        """The latest estimate."""

    def denoise(self, x: Tensor, rung: Rung) -> Tensor:
        """x_0_hat at (x, rung), clipped: one network call."""
        return self._noted(self.denoiser(x, *rung.like(x), **self.cond))

    def outputs(self, x: Tensor, rung: Rung) -> Outputs:
        """Everything the denoiser says, x_0_hat clipped."""
        found = outputs_of(self.denoiser, x, *rung.like(x), **self.cond)
        return found._replace(x_0=self._noted(found.x_0))

    def _noted(self, x_0_hat: Tensor) -> Tensor:
        self.calls += 1
        self.x_0_hat = x_0_hat if self.clip is None else x_0_hat.clamp(-self.clip, self.clip)
        return self.x_0_hat

    def at(self, half_log_snr: float) -> Rung:
        """The path's level with that log(alpha/sigma)."""
        (rung,) = rungs(self.schedule.at(torch.tensor(2 * half_log_snr, dtype=torch.float64)))
        return rung


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

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        """x_s from x_t.

        Args:
            walk: the network, the path, noise and the walk's memory.
            x_t: (B, ...); not to be changed in place.
            t, s: two noisy levels, s the cleaner; t.alpha is at least t.sigma/1e6.
        """
        raise NotImplementedError

    def finish(self, walk: Walk, x_t: Tensor, t: Rung) -> Tensor:
        """The sample from x_t at the last noisy level: x_0_hat, onto which every first-order step jumps."""
        return walk.denoise(x_t, t)

    def levels(self, schedule: Schedule) -> list[Rung]:
        """The N noisy levels and the clean one."""
        return [*rungs(schedule(self.spacing(schedule, self.steps))), CLEAN]

    @torch.no_grad()
    def walk(
        self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor | Callable[[], Tensor], **cond: Any
    ) -> Iterator[State]:
        """The states of a walk, the first being x_T = sigma_T noise and the last the sample.

        Args:
            denoiser: any callable (x_t, alpha_t, sigma_t, **cond) -> x_0_hat, with levels of shape (B, 1, ...).
            schedule: the path; it need not be the one that was trained on.
            noise: the initial standard normal (B, ...), or a source of normals, such as ``denoiselab.rng.Noise``.
        """
        source = From(noise) if isinstance(noise, Tensor) else noise
        walk = Walk(denoiser, schedule, source, self.clip, **cond)
        *noisy, clean = self.levels(walk.schedule)
        x_t = noisy[0].sigma * source()
        yield State(x_t, noisy[0], None, 0)
        for t, s in itertools.pairwise(noisy):
            x_t = self.step(walk, x_t, t, s)
            yield State(x_t, s, walk.x_0_hat, walk.calls)
        x_0 = self.finish(walk, x_t, noisy[-1])
        yield State(x_0, clean, walk.x_0_hat, walk.calls)

    def __call__(
        self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor | Callable[[], Tensor], **cond: Any
    ) -> Tensor:
        """x_0, shaped like the noise; arguments as for walk.

        >>> import denoiselab
        >>> parts = denoiselab.build("schedule=cosine", "sampler=ddim", "sampler.steps=10")
        >>> def denoiser(x_t, alpha_t, sigma_t):                  # exact for data N(0, 1)
        ...     return alpha_t * x_t / (alpha_t**2 + sigma_t**2)
        >>> x_0 = parts.sampler(denoiser, parts.schedule, torch.randn(10_000, 1))
        >>> bool((x_0.std() - 1).abs() < 0.2)
        True
        """
        return deque(self.walk(denoiser, schedule, noise, **cond), maxlen=1).pop().x_t  # one state at a time
