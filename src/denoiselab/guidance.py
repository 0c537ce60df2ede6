"""Guidance: denoisers made of denoisers, with the same call, so that they nest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.conditioning import null

DenoiserLike = Callable[..., Tensor]
"""Any callable denoiser(x_t, alpha_t, sigma_t, **cond) -> x_0_hat."""


class CFG:
    """x_0_hat = x_0_null + scale (x_0_cond - x_0_null) (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    Guiding x_0 and guiding eps are the same, both being affine in each other at fixed x_t. ``scale`` is 1 + w of
    the paper: 1 switches guidance off, 0 is unconditional; other scales put twice the rows through the network.

    Args:
        denoiser: the denoiser to guide.
        scale: any finite number.
    """

    def __init__(self, denoiser: DenoiserLike, scale: float = 1.0):
        self.denoiser, self.scale = denoiser, _finite(scale)

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Tensor:
        if self.scale == 1 or not cond:
            return self.denoiser(x_t, alpha_t, sigma_t, **cond)
        if self.scale == 0:
            return self.denoiser(x_t, alpha_t, sigma_t, **null(cond))
        both = {key: torch.cat([nothing, cond[key]]) for key, nothing in null(cond).items()}
        twice = (torch.cat([value, value]) for value in (x_t, alpha_t, sigma_t))
        unconditional, conditional = self.denoiser(*twice, **both).chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)


def scale_from_w(w: float) -> float:
    """The guidance scale of the convention (1 + w) eps_cond - w eps_null: scale = 1 + w."""
    return 1 + w


def _finite(scale: float) -> float:
    if not float("-inf") < scale < float("inf"):
        raise ValueError(f"scale={scale}: need a finite number; 1 is off, 0 unconditional")
    return scale


def unguided(denoiser: DenoiserLike) -> DenoiserLike:
    """The denoiser as it is."""
    return denoiser
