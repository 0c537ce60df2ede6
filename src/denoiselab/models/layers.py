"""Parts that networks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NOISE_SCALE = 250.0
"""c_noise = log(sigma/alpha)/4 spans about +-3.5; times 250 it spans the sinusoids as t = 0..1000 does in DDPM."""


class Embedding(nn.Module):
    """The vector that conditions a network: MLP(sinusoids(250 c_noise)) + label token.

    Sinusoids as in Dhariwal and Nichol 2021 (arXiv:2105.05233): [cos, sin] of f_i = 10000^(-i/pairs). They are
    computed in float32 whatever the precision of the rest.

    Args:
        channels: width of the sinusoids, even.
        width: width of the result.
        num_classes: labels 0..num_classes-1 and a learned null token for label -1; 0 for no labels.
    """

    def __init__(self, channels: int, width: int, num_classes: int = 0):
        super().__init__()
        self.pairs = channels // 2
        self.mlp = nn.Sequential(nn.Linear(2 * self.pairs, width), nn.SiLU(), nn.Linear(width, width))
        self.num_classes = num_classes
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None

    def forward(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        # Made here and not a buffer, which bf16-true would round.
        ladder = torch.arange(self.pairs, device=c_noise.device) / self.pairs
        frequencies = torch.exp(-math.log(10_000) * ladder)  # (pairs,), float32
        angles = c_noise.float()[:, None] * NOISE_SCALE * frequencies  # (B, pairs)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, channels)
        dtype = next(self.mlp.parameters()).dtype
        h = self.mlp(sinusoids.to(dtype))  # (B, width)
        if self.label is None:
            return h
        if label is None:
            return h + self.label.weight[self.num_classes]
        return h + self.label(torch.where(label < 0, self.num_classes, label))


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def require(name: str, value: object, ok: bool, need: str) -> None:
    """Raise the one-line error of a bad option unless ok."""
    if not ok:
        raise ValueError(f"{name}={value}: need {need}")
