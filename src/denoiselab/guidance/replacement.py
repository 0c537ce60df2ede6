"""The truth in place of the estimate, at some noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.arguments import Unbounded
from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided
from denoiselab.guidance.interval import Range


class Replacement(Guidance):
    """x_0_hat = truth where low < sigma/alpha <= high, the denoiser's elsewhere: how much would a perfect estimate
    there be worth?

    ``truth`` is a condition, (B, ...); without it nothing is replaced. The residual x_t/alpha_t - truth of a DDIM
    walk shrinks over replaced steps by exactly r_end/r_start, r = sigma/alpha, whatever the model; a replaced last
    step returns the truth. So compare with that curve, and leave the last step out. With the condition ``mask``,
    broadcastable to x, the truth is used only where mask is 1: inpainting by replacement, in x_0 space.

    Setting x_t itself back to alpha_t truth + sigma_t eps is another experiment and no guidance: it changes the walk,
    not the estimate.

    Args:
        denoiser: the denoiser to guide.
        low, high: the range of noise levels, 0 <= low < high.
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        low: float = 0.0,
        high: Unbounded = float("inf"),
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, guidance)
        self.range = Range(low, high)

    def outputs(
        self,
        x_t: Tensor,
        alpha_t: Tensor,
        sigma_t: Tensor,
        *,
        truth: Tensor | None = None,
        mask: Tensor | None = None,
        **cond: Any,
    ) -> Outputs:
        found = outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        if truth is None:
            return found
        replaced = self.range(alpha_t, sigma_t)
        replaced = replaced if mask is None else replaced & mask.bool()
        return found._replace(x_0=torch.where(replaced, truth, found.x_0))
