"""The network as an estimator of x_0: the only place with input scaling, noise conditioning and dtype casts."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from denoiselab.schedule import RATIO
from denoiselab.target import Target


class Outputs(NamedTuple):
    """What a denoiser says about x_t; every tensor has a row per sample."""

    x_0: Tensor
    variance: Tensor | None = None
    """Where the variance of a reverse step lies between its two bounds, in log space: 0 is beta tilde, 1 is beta."""
    heads: Tensor | None = None
    """The estimates of x_0 of several heads, (B, heads, ...)."""


class Denoiser(nn.Module):
    """x_0_hat(x_t, alpha_t, sigma_t) = target.to_x_0(net(c_in x_t, c_noise)).

    c_in = 1/sqrt(alpha_t^2 sigma_data^2 + sigma_t^2) gives the network inputs of unit mean square at every level, and
    c_noise = log(sigma_t/alpha_t)/4 is all it learns of the level (Karras et al. 2022, arXiv:2206.00364, table 1,
    written for any alpha_t). It never sees t, a schedule or a step count, so one trained network can be sampled
    along any schedule.

    Args:
        net: ``net(x, c_noise, **cond) -> y``, x of shape (B, C, ...), c_noise of shape (B,), y of shape
            (B, net_outputs C, ...).
        target: what y means.
        sigma_data: the root mean square of x_0, > 0.
    """

    net_outputs: ClassVar[int] = 1
    """How many tensors like x the network returns, stacked along its channels."""

    has_target: ClassVar[bool] = True
    """Whether the run's target is what its network predicts."""

    has_variance: ClassVar[bool] = False
    """Whether it says the variance of a reverse step."""

    generates: ClassVar[bool] = True
    """Whether it can be sampled; False for an autoencoder."""

    def __init__(self, net: nn.Module, target: Target, sigma_data: float = 1.0):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data}: need a number > 0")
        self.net, self.target, self.sigma_data = net, target, sigma_data

    def ask(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Tensor:
        """The network's answer y, in x_t's dtype; shapes: x_t (B, ...), alpha_t and sigma_t (B, 1, ...)."""
        c_in = torch.hypot(self.sigma_data * alpha_t, sigma_t).reciprocal()
        c_noise = (sigma_t / alpha_t).clamp(1 / RATIO, RATIO).log().flatten() / 4
        dtype = next(self.net.parameters()).dtype
        y = self.net((c_in * x_t).to(dtype), c_noise.to(torch.promote_types(dtype, torch.float32)), **cond)
        return y.to(x_t.dtype)

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        """Everything it says about x_t."""
        y = self.ask(x_t, alpha_t, sigma_t, **cond)
        return Outputs(self.target.to_x_0(y, x_t, alpha_t, sigma_t))

    def forward(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Tensor:
        """x_0_hat, shaped like x_t."""
        return self.outputs(x_t, alpha_t, sigma_t, **cond).x_0


class LearnedVariance(Denoiser):
    """A denoiser whose network also says the variance of a reverse step: exp(v log beta + (1 - v) log beta_tilde),
    v = (its second output + 1)/2 (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15).

    v is not held in [0, 1]; what starts at zero starts half way.
    """

    net_outputs: ClassVar[int] = 2
    has_variance: ClassVar[bool] = True

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        """x_0 and the variance, of x_t's shape each."""
        y, v = self.ask(x_t, alpha_t, sigma_t, **cond).chunk(2, 1)
        return Outputs(self.target.to_x_0(y, x_t, alpha_t, sigma_t), variance=(v + 1) / 2)


class Reconstructor(Denoiser):
    """D(E(x)), whatever the level: an autoencoder in the place of a denoiser, so that it is trained, averaged, kept and
    loaded like one.

    Its network has ``forward(image, penalty=True) -> (x_0_hat, penalty)``, of shapes (B, C, H, W) and (B,).
    """

    has_target: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    def reconstruct(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """x_0_hat and the penalty, as in training."""
        dtype = next(self.net.parameters()).dtype
        x_0_hat, penalty = self.net(x_0.to(dtype), penalty=True)
        return x_0_hat.to(x_0.dtype), penalty.to(x_0.dtype)

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        """x_0 alone: the reconstruction of x_t."""
        dtype = next(self.net.parameters()).dtype
        return Outputs(self.net(x_t.to(dtype)).to(x_t.dtype))


@torch.no_grad()
def reconstructed(denoiser: Reconstructor, x_0: Tensor, device: torch.device, batch: int = 64) -> Tensor:
    """D(E(x_0)) as float32 on the CPU, so many at a time; the denoiser in evaluation mode."""
    one, none = torch.ones((), device=device), torch.zeros((), device=device)
    return torch.cat([denoiser(part.to(device), one, none).float().cpu() for part in x_0.split(batch)])
