"""Losses whose gradients and variances are known, for what measures them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics import Subject
from denoiselab.loss import Loss
from healthy import subject


class Theta(nn.Module):
    """A network that is its parameters."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta)


class Of(Loss):
    """l = f(theta, eps, t), with theta (P,), eps (B, 2) and t (B,)."""

    formula = "known"

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.f = f

    def forward(self, denoiser, schedule, x_0, eps, t, **cond):
        loss = self.f(denoiser.net.theta, eps, t.flatten())
        return loss, {"mse": loss.detach()}


def knowing(run: Path, f: Callable[[Tensor, Tensor, Tensor], Tensor], theta: Tensor) -> Subject:
    """A run whose loss is f at these parameters."""
    seen = subject(run)
    seen.run.denoiser = Denoiser(Theta(theta), seen.run.denoiser.target)
    seen.run.loss = Of(f)
    return seen
