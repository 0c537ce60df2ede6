"""What trains an autoencoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from denoiselab.denoiser import Denoiser, Reconstructor
from denoiselab.loss.base import Loss
from denoiselab.schedule import Schedule


class Reconstruction(Loss):
    """mean |x_0_hat - x_0|^2 + penalty, x_0_hat = D(E(x_0)): nothing is diffused, and the schedule, the noise and the
    times are not looked at. The penalty is the bottleneck's own (models/autoencoder.py)."""

    formula = "mean |D(E(x_0)) - x_0|^2 + penalty"
    denoiser: ClassVar[type[Denoiser]] = Reconstructor

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(denoiser, Reconstructor)
        x_0_hat, penalty = denoiser.reconstruct(x_0)
        mse = (x_0_hat - x_0).square().flatten(1).mean(1)
        return mse + penalty, {"mse": mse.detach(), "penalty": penalty.detach()}
