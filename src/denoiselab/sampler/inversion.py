"""From data back to the noise that it is sampled from."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from denoiselab.guidance import DenoiserLike
from denoiselab.sampler.base import Sampler, Walk, no_noise
from denoiselab.sampler.ddim import ddim
from denoiselab.schedule import Schedule


@torch.no_grad()
def invert(sampler: Sampler, denoiser: DenoiserLike, schedule: Schedule, x_0: Tensor, **cond: Any) -> Tensor:
    """The noise from which deterministic samplers find x_0: DDIM's step taken towards more noise, along the sampler's
    levels (Song et al. 2021, arXiv:2010.02502, section 5.4).

    Each step takes the estimate at the level that it starts from; the first one, which starts from data, at the first
    noisy level. DDIM along the same levels finds x_0 again up to an error that falls as 1/N.

    Args:
        sampler: whose levels and clip to use; its N levels cost N network calls.
        denoiser, schedule, cond: as for ``Sampler.walk``.
        x_0: the data (B, ...).

    Returns:
        The noise, shaped like x_0: what ``sampler(denoiser, schedule, noise, **cond)`` takes.

    >>> import denoiselab
    >>> parts = denoiselab.build("schedule=cosine", "sampler=ddim", "sampler.steps=200")
    >>> def denoiser(x_t, alpha_t, sigma_t):                  # exact for data N(0, 1)
    ...     return alpha_t * x_t / (alpha_t**2 + sigma_t**2)
    >>> x_0 = torch.tensor([[0.5], [-1.0]])
    >>> noise = invert(parts.sampler, denoiser, parts.schedule, x_0)
    >>> bool((parts.sampler(denoiser, parts.schedule, noise) - x_0).abs().max() < 0.02)
    True
    """
    walk = Walk(denoiser, schedule, no_noise, sampler.clip, **cond)
    *noisy, clean = sampler.levels(walk.schedule)
    noisy.reverse()
    first = noisy[0]
    x_t = first.alpha / clean.alpha * x_0
    x_t = 2 * x_t - first.alpha * walk.denoise(x_t, first)  # plus sigma eps_hat
    for t, s in itertools.pairwise(noisy):
        x_t = ddim(x_t, walk.denoise(x_t, t), t, s)
    return x_t / noisy[-1].sigma
