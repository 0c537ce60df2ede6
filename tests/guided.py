"""What tests of guidance share: levels and labels to ask at, denoisers, and every option around one."""

import math
from typing import Any

import torch
from torch import Tensor

from denoiselab.schedule import Cosine
from exact import OPTIONS, Mixture, normals, parts

LABEL = torch.arange(6) % 3
SCALES = [-1.0, 0.0, 0.5, 1.0, 2.0, 7.0]
LOW, HIGH = 0.3, 2.0
"""Ends of an interval of sigma/alpha that some of asked() are in."""


class Recording:
    """A denoiser that remembers how it was called."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((len(x_t), cond))
        return self.inner(x_t, alpha_t, sigma_t, **cond)


def asked(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x_t at a level of its own for each of six samples."""
    alpha_t, sigma_t = Cosine()(torch.linspace(0.1, 0.9, 6, dtype=torch.float64)[:, None])
    return tuple(value.to(dtype) for value in (normals(6, 2), alpha_t, sigma_t))


def eight() -> Mixture:
    """Eight modes on a circle of radius 2, the label naming one."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return Mixture(2 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.4)


POINTS = ("data=8gaussians", "model=mlp")


def option(name: str, denoiser: Any, *overrides: str) -> Any:
    """A guidance around a denoiser; autoguidance's bad model says 0."""
    if name != "autoguidance":
        return parts(f"guidance={name}", *overrides).guidance(denoiser=denoiser)
    found = parts(f"guidance={name}", "guidance.bad.ckpt=none", *overrides)
    node = {key: value for key, value in found.config["guidance"].items() if key != "bad"}
    return found.make("guidance", node, denoiser=denoiser, bad=lambda x_t, alpha_t, sigma_t, **cond: 0 * x_t)


GUIDED = [name for name in OPTIONS["guidance"] if name != "none"]
