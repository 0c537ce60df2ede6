"""Thresholding of x_0_hat, for large guidance scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided


class DynamicThreshold(Guidance):
    """x_0_hat clipped to [-s, s] and divided by s/least, where s >= least is a quantile of the sample's |x_0_hat|
    (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Large scales push x_0_hat out of the range of images; clipping saturates what lies beyond, this pulls all of it
    in. What already lies in [-least, least] stays as it is, so it belongs outside of the guidance that it mends.

    Args:
        denoiser: the denoiser to guide.
        percentile: of the sample's absolute values, in (0, 100]; 99.5 is common.
        least: the bound on |x_0|, > 0: 1 for images in [-1, 1].
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        percentile: float = 99.5,
        least: float = 1.0,
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, guidance)
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile}: need a number in (0, 100], such as 99.5")
        if not least > 0:
            raise ValueError(f"least={least}: need a number > 0; 1 for images in [-1, 1]")
        self.percentile, self.least = percentile, least

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        found = outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        s = quantile(found.x_0.abs().flatten(1), self.percentile / 100).clamp_min(self.least)
        s = s.view(-1, *[1] * (x_t.ndim - 1))
        return found._replace(x_0=found.x_0.clamp(-s, s) * (self.least / s))


def quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of each row, linear between values; (B, N) -> (B,). torch's own refuses more than 2^24 values."""
    ordered, last = x.sort(1).values, x.shape[1] - 1
    low = int(q * last)
    return torch.lerp(ordered[:, low], ordered[:, min(low + 1, last)], q * last - low)
