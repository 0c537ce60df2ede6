"""Training losses, per sample."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.schedule import Schedule


class Loss(nn.Module):
    """A loss per sample, and what it is made of."""

    formula: str
    """What is minimised, for people to read."""

    denoiser: ClassVar[type[Denoiser]] = Denoiser
    """What it trains: a denoiser whose network has the outputs that this loss needs."""

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, parts): loss of shape (B,) with its graph; parts detached, shape (B,), always with ``mse``, the
        mean squared x_0 error, and with ``t`` where the network was asked at other times than those given.

        Args:
            x_0, eps: data and standard normal noise, (B, ...).
            t: times in [0, 1], (B, 1, ...).
        """
        raise NotImplementedError

    def advance(self, samples_seen: int) -> None:
        """Called before each optimizer step, for what follows the progress of training."""

    def after_step(self, denoiser: Denoiser) -> None:
        """Called after each optimizer step, for what follows the weights."""
