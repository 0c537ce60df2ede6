"""The DPM-Solver family as its papers have it, step by step, for the tests of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from denoiselab.guidance import DenoiserLike
from denoiselab.sampler import Rung, Sampler, Walk
from denoiselab.sampler.base import CLEAN, no_noise
from denoiselab.schedule import Linear, Schedule
from exact import solve, triangle
from walks import option

SINGLESTEP = {"dpm_solver_2": 2, "dpm_solver_3": 3, "dpmpp_2s": 2}
"""Network calls of a step."""

MULTISTEP = ["dpm_solver_2m", "dpm_solver_3m", "dpm_solver_3m_corrected", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_corrected"]
UNIPC = ["unipc", "unipc_b1"]
SDE = ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"]
OWN = [*SINGLESTEP, *MULTISTEP, *UNIPC, *SDE]


def published(name: str, steps: int, spacing: str = "log_snr", **arguments: Any) -> Sampler:
    """With no bound on how far estimates are extrapolated, unless one is given."""
    if name in (*MULTISTEP, *UNIPC, "dpmpp_2m_sde", "dpmpp_3m_sde"):
        arguments.setdefault("reach", math.inf)
    return option(name, spacing, steps, **arguments)


def walk(
    found: Sampler,
    denoiser: DenoiserLike,
    levels: list[Rung],
    x_t: Tensor,
    noise: Callable[[], Tensor] = no_noise,
    schedule: Schedule | None = None,
    exact_start: int = 0,
) -> list[Tensor]:
    """x at every level, the clean one too if it is among them. The first ``exact_start`` steps only fill the memory:
    x_t comes from the flow."""
    going, path = Walk(denoiser, schedule or Linear(), noise), [x_t]
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        stepped = found.step(going, path[-1], t, s) if s.sigma else found.finish(going, path[-1], t)
        path.append(solve(denoiser, path[-1], t, s, 16) if i < exact_start else stepped)
    return path


def rung(ratio: float) -> Rung:
    """The level of that sigma/alpha on the circle."""
    alpha = (1 + ratio**2) ** -0.5
    return Rung(alpha, ratio * alpha)


def apart(ours: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference at any level."""
    return max((a - b).abs().max().item() for a, b in zip(ours, others, strict=True))


# A second implementation

THEIRS = {"linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}


def theirs(name: str, betas: str, steps: int, last: float = 0.0, **arguments: Any) -> tuple[Any, list[Rung]]:
    """A scheduler of diffusers with its levels in float64, and the same levels as rungs. ``last`` is sigma at the end:
    noise prediction cannot go to 0 there."""
    import diffusers

    arguments.setdefault("final_sigmas_type", "sigma_min" if last else "zero")
    reference = getattr(diffusers, name)(**THEIRS[betas], prediction_type="sample", **arguments)
    reference.set_timesteps(steps)
    alphas = (1 - reference.betas.double()).cumprod(0)[reference.timesteps]
    reference.sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.tensor([last], dtype=torch.float64)])
    return reference, [*(rung(sigma) for sigma in reference.sigmas[:-1].tolist()), CLEAN]


def their_path(
    reference: Any, levels: list[Rung], x_t: Tensor, noise: Callable[[], Tensor] | None = None
) -> list[Tensor]:
    """x at every level of a scheduler of diffusers."""
    path, asked = [x_t], Walk(triangle(), Linear())
    for t, index in zip(levels, reference.timesteps.tolist(), strict=False):
        extra = {} if noise is None else {"variance_noise": noise()}
        path.append(reference.step(asked.denoise(path[-1], t), index, path[-1], **extra).prev_sample)
    return path


NUMBERS = pytest.mark.parametrize("steps", [5, 10, 20, 50])


BETAS = pytest.mark.parametrize("betas", list(THEIRS))
