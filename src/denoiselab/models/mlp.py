"""A residual MLP for points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from denoiselab.models.embedding import NoiseEmbedding
from denoiselab.models.layers import Conditioner, require, zeroed


class MLP(nn.Module):
    """Residual blocks h + W_2 SiLU((1 + scale) norm(W_1 h) + shift), scale and shift from the conditions.

    Args:
        shape: one sample's shape, (D,).
        num_classes: 0 for no labels.
        vector: entries of a free conditioning vector; 0 for none.
        embedding: of the noise level; None for LogSNR.
        width: hidden width, >= 8.
        depth: number of blocks, >= 1.
        outputs: tensors like x that it returns, stacked along the coordinates.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        vector: int = 0,
        embedding: NoiseEmbedding | None = None,
        width: int = 128,
        depth: int = 4,
        outputs: int = 1,
    ):
        super().__init__()
        require("shape", tuple(shape), len(shape) == 1, "points of shape (D,); images want a U-Net")
        require("width", width, width >= 8, "at least 8")
        require("depth", depth, depth >= 1, "at least 1")
        (dim,) = shape
        self.condition = Conditioner(64, width, num_classes, vector, embedding)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zeroed(nn.Linear(width, outputs * dim)))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        condition = self.condition(c_noise, label, vector)  # (B, width)
        h = self.first(x)  # (B, width)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(h)  # (B, outputs D)


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.second = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(torch.nn.functional.silu(condition)).chunk(2, dim=1)
        inner = self.norm(self.first(h)) * (1 + scale) + shift
        return h + self.second(torch.nn.functional.silu(inner))
