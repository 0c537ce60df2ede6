"""Guidance by a worse version of the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided


class Autoguidance(Guidance):
    """x_0_hat = x_0_bad + scale (x_0_good - x_0_bad) (Karras et al. 2024, arXiv:2406.02507, section 3).

    The bad model makes the same errors, only larger: a smaller network, or one trained for less time. Both get the
    same condition, so samples keep the variety that CFG takes from them, and unconditional models can be guided too.

    Args:
        denoiser: the good model.
        bad: the worse model, any denoiser; ``denoiselab.run.frozen`` gives another run's.
        scale: any finite number; 1 is off and never calls the bad model.
        guidance: what guides the good model first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        bad: DenoiserLike,
        scale: float = 1.0,
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, guidance)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: need a finite number; 1 is off")
        self.bad, self.scale = bad, scale

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        good = outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        if self.scale == 1:
            return good
        if isinstance(self.bad, nn.Module):
            self.bad.to(x_t.device)  # it was loaded apart from the good model, and does not move along with it
        return good._replace(x_0=torch.lerp(self.bad(x_t, alpha_t, sigma_t, **cond), good.x_0, self.scale))
