"""The network as an estimator of x_0: the only place with input scaling, noise conditioning and dtype casts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from denoiselab.schedule import log_snr
from denoiselab.target import Target


class Outputs(NamedTuple):
    """What a denoiser says about x_t."""

    x_0: Tensor
    variance: Tensor | None = None
    heads: Tensor | None = None


class Denoiser(nn.Module):
    """x_0_hat(x_t, alpha_t, sigma_t) = target.to_x_0(net(c_in x_t, c_noise)).

    c_in = 1/sqrt(alpha_t^2 sigma_data^2 + sigma_t^2) gives the network inputs of unit variance at every level, and
    c_noise = log(sigma_t/alpha_t)/4 is all it learns of the level (Karras et al. 2022, arXiv:2206.00364, table 1,
    written for any alpha_t). It never sees t, a schedule or a step count, so one trained network can be sampled
    along any schedule.

    Args:
        net: ``net(x, c_noise, **cond) -> y``, x of shape (B, ...), c_noise of shape (B,).
        target: what y means.
        sigma_data: the standard deviation of x_0, > 0.
    """

    def __init__(self, net: nn.Module, target: Target, sigma_data: float = 1.0):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data}: need a number > 0")
        self.net, self.target, self.sigma_data = net, target, sigma_data

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        """Everything the network predicts; shapes: x_t (B, ...), alpha_t and sigma_t (B, 1, ...)."""
        c_in = (alpha_t**2 * self.sigma_data**2 + sigma_t**2).rsqrt()
        c_noise = log_snr(alpha_t, sigma_t).flatten() / -8
        dtype = next(self.net.parameters()).dtype
        y = self.net((c_in * x_t).to(dtype), c_noise.to(torch.promote_types(dtype, torch.float32)), **cond)
        return Outputs(self.target.to_x_0(y.to(x_t.dtype), x_t, alpha_t, sigma_t))

    def forward(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Tensor:
        """x_0_hat, shaped like x_t."""
        return self.outputs(x_t, alpha_t, sigma_t, **cond).x_0
