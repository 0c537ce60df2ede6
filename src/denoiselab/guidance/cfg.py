"""Classifier-free guidance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from denoiselab.conditioning import null
from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of


class CFG(Guidance):
    """x_0_hat = x_0_null + scale (x_0_cond - x_0_null) (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    Guiding x_0 and guiding eps are the same, both being affine in each other at fixed x_t. ``scale`` is 1 + w of
    the paper: 1 switches guidance off, 0 is unconditional; other scales put twice the rows through the network.

    Args:
        denoiser: the denoiser to guide.
        scale: any finite number.
    """

    def __init__(self, denoiser: DenoiserLike, scale: float = 1.0):
        super().__init__(denoiser)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: need a finite number; 1 is off, 0 unconditional")
        self.scale = scale

    @property
    def needs_null(self) -> bool:
        return self.scale != 1

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        if self.scale == 1 or not cond:
            return outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        if self.scale == 0:
            return outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **null(cond))
        conditional, unconditional = both(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        return conditional._replace(x_0=torch.lerp(unconditional.x_0, conditional.x_0, self.scale))


def both(denoiser: DenoiserLike, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> tuple[Outputs, Outputs]:
    """What a denoiser says with its condition, and without; in one call of twice the rows."""
    twice = (torch.cat([value, value]) for value in (x_t, alpha_t, sigma_t))
    together = {key: torch.cat([cond[key], nothing]) for key, nothing in null(cond).items()}
    found = outputs_of(denoiser, *twice, **together)
    n = len(x_t)
    first, second = ([None if value is None else value[part] for value in found] for part in (slice(n), slice(n, None)))
    return Outputs(*first), Outputs(*second)  # pyright: ignore[reportArgumentType]


def scale_from_w(w: float) -> float:
    """The guidance scale of the convention (1 + w) eps_cond - w eps_null: scale = 1 + w."""
    return 1 + w
