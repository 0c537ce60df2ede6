"""A network of equal units with dropout, for tests of what acts on units from outside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.models.layers import Conditioner


class Unit(nn.Module):
    """h + W_2 dropout(silu(W_1 h + condition))."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return h + self.second(self.dropout(F.silu(self.first(h) + condition)))


class Chain(nn.Module):
    """For points of shape (D,)."""

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        outputs: int = 1,
        width: int = 16,
        depth: int = 3,
        dropout: float = 0.2,
    ):
        super().__init__()
        (dim,) = shape
        self.condition = Conditioner(16, width, num_classes)
        self.first, self.last = nn.Linear(dim, width), nn.Linear(width, outputs * dim)
        self.blocks = nn.ModuleList(Unit(width, dropout) for _ in range(depth))

    @property
    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        condition = self.condition(c_noise, label)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(h)


OPTIONS = ("data=8gaussians", "data.n=64", "data.batch_size=8", "model=mlp", "model._target_=chain.Chain")
OPTIONS += ("model.width=16", "model.depth=3", "metrics=none", "callbacks=none", "trainer.threads=1")


def inputs(n: int = 8) -> tuple[Tensor, Tensor]:
    """x and c_noise."""
    return torch.linspace(-1, 1, 2 * n).view(n, 2), torch.linspace(-0.5, 0.5, n)
