"""Ranges of noise levels, and guidance in one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.arguments import Unbounded
from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, outputs_of, unguided
from denoiselab.guidance.cfg import CFG


class Range:
    """low < sigma/alpha <= high: noise levels in units of x_0, the same for every schedule.

    Args:
        low: >= 0; 0 reaches down to the data.
        high: > low; inf reaches up to pure noise.
    """

    def __init__(self, low: float, high: float):
        if not 0 <= low < high:
            raise ValueError(f"low={low}, high={high}: need 0 <= low < high, as sigma/alpha")
        self.low, self.high = low, high

    def __call__(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Whether each level lies in it; shaped like alpha_t."""
        return (self.low * alpha_t < sigma_t) & (sigma_t <= self.high * alpha_t)


class Interval(CFG):
    """CFG where low < sigma/alpha <= high, the conditional estimate elsewhere (Kynkäänniemi et al. 2024,
    arXiv:2404.07724, section 3).

    At high noise guidance drops modes, at low noise it does nothing. The bounds are noise levels in units of x_0, so
    they mean the same whatever the schedule, the sampler and its steps.

    Outside the interval a call costs one row per sample, not two: half the network's work is worth one look at the
    levels. A look makes the CPU wait for a GPU, once per call; training never guides, so it never waits.

    Args:
        denoiser: the denoiser to guide.
        scale: as for CFG.
        low, high: the interval, 0 <= low < high.
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float = 1.0,
        low: float = 0.0,
        high: Unbounded = float("inf"),
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, scale, guidance)
        self.range = Range(low, high)

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        inside = self.range(alpha_t, sigma_t)
        rows = int(inside.sum()) if self.scale != 1 else 0
        if rows == len(x_t):
            return super().outputs(x_t, alpha_t, sigma_t, **cond)
        plain = outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        if rows == 0:
            return plain
        guided = super().outputs(x_t, alpha_t, sigma_t, **cond)
        return plain._replace(x_0=torch.where(inside, guided.x_0, plain.x_0))
