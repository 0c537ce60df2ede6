"""Classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.conditioning import null
from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided


class CFG(Guidance):
    """x_0_hat = x_0_null + scale (x_0_cond - x_0_null) (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    Guiding x_0 and guiding eps are the same, both being affine in each other at fixed x_t. ``scale`` is 1 + w of
    the paper: 1 switches guidance off, 0 is unconditional; other scales put twice the rows through the network.

    Args:
        denoiser: the denoiser to guide.
        scale: any finite number.
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float = 1.0,
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, guidance)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: need a finite number; 1 is off, 0 unconditional")
        self.scale = scale

    @property
    def needs_null(self) -> bool:
        return self.scale != 1 or super().needs_null

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        if self.scale == 1 or not cond:
            return outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        if self.scale == 0:
            return outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **null(cond))
        conditional, unconditional = both(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        return conditional._replace(x_0=torch.lerp(unconditional.x_0, conditional.x_0, self.scale))


class Rescale(CFG):
    """x_0_hat = phi (std x_0_cond / std x_0_cfg) x_0_cfg + (1 - phi) x_0_cfg (Lin et al. 2023, arXiv:2305.08891,
    eq. 14-16), with each sample's standard deviation over all its values.

    Large scales overexpose: the guided estimate has more contrast than any image of its class. The paper rescales
    the network's output, which here may be anything; x_0 is what is overexposed, and the same for every target.
    Both are the same where alpha_t = 0 (v = -x_0 there) or the target is x_0. Towards the data they part: v and eps
    hold x_t too, whose share the paper rescales along.

    Args:
        denoiser: the denoiser to guide.
        scale: as for CFG.
        phi: from 0, plain CFG, to 1; 0.7 in the paper.
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float = 1.0,
        phi: float = 0.7,
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, scale, guidance)
        if not 0 <= phi <= 1:
            raise ValueError(f"phi={phi}: need a number in [0, 1]; 0 is plain CFG")
        self.phi = phi

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        if self.phi == 0 or self.scale == 1 or not cond:
            return super().outputs(x_t, alpha_t, sigma_t, **cond)
        conditional, unconditional = both(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        guided = torch.lerp(unconditional.x_0, conditional.x_0, self.scale)
        have, want = (
            x_0.std(tuple(range(1, x_0.ndim)), correction=0, keepdim=True) for x_0 in (guided, conditional.x_0)
        )
        gain = torch.where(have > 0, want / have, 1.0)
        return conditional._replace(x_0=torch.lerp(guided, gain * guided, self.phi))


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
