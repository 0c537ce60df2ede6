"""How a network is told of the noise level: from c_noise to features, always in float32.

Two sinusoidal conventions are published and are not interchangeable: DDPM's and ADM's. They differ in the ladder of
frequencies and in the order of sines and cosines, and both are functions of a table's index. The default is a function
of the log-SNR alone, so that a network can be used along any schedule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.buffers import ExactBuffers

NOISE_SCALE = 250.0
"""c_noise = log(sigma/alpha)/4 spans about +-3.5; times 250 it spans the sinusoids as t = 0..1000 does in DDPM."""

WHOLE = 1e-6
"""An index within this share of T of a whole number is that number: c_noise and t in float32 place it to 3e-7 T."""


class NoiseEmbedding(nn.Module):
    """features(c_noise), float32 (B, channels)."""

    def forward(self, c_noise: Tensor, channels: int) -> Tensor:
        raise NotImplementedError


class LogSNR(NoiseEmbedding):
    """[cos, sin] of scale c_noise f_i, f_i = 10000^(-i/half), half = channels/2.

    c_noise = log(sigma_t/alpha_t)/4 as in Karras et al. 2022 (arXiv:2206.00364, table 1), with the sinusoids of
    Dhariwal and Nichol 2021 (arXiv:2105.05233).

    Args:
        scale: of c_noise, > 0; the default spans the sinusoids as DDPM's 1,000 indices do.
    """

    def __init__(self, scale: float = NOISE_SCALE):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale={scale}: need a number > 0")
        self.scale = scale

    def forward(self, c_noise: Tensor, channels: int) -> Tensor:
        angles = self.scale * c_noise.float()[:, None] * ladder(channels // 2, channels // 2, c_noise.device)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Indexed(ExactBuffers, NoiseEmbedding):
    """Of the index 0..T-1 that the log-SNR has in the table of a schedule.

    Along another schedule the index is that of the level with the same log-SNR; between two points of the table it is
    in proportion, beyond its ends it is that of the end.

    Args:
        schedule: whose index it is; must not learn.
        points: T of a schedule that has no table of its own, >= 2; None for 1,000 or the table's own.
    """

    c_noise_table: Tensor

    def __init__(self, schedule: Any, points: int | None = None):
        super().__init__()
        name = type(schedule).__name__
        if schedule.learns:
            raise ValueError(f"schedule={name}: need one that does not learn, so that its index stays, or log_snr")
        if points is not None and (points < 2 or schedule.points not in (None, points)):
            own = "at least 2" if schedule.points is None else f"the {schedule.points} of its table"
            raise ValueError(f"points={points}: need {own}")
        points = points or schedule.points or 1000
        t = torch.linspace(0, 1, points, dtype=torch.float64, device=schedule.device)
        table = schedule.log_snr(t) / -8  # log(sigma/alpha)/4, float64
        if not bool((table.diff() > 0).all()):
            raise ValueError(f"schedule={name}: need sigma/alpha between 1e-6 and 1e6, within which levels differ")
        self.register_buffer("c_noise_table", table.to(torch.get_default_device()), persistent=False)

    def index(self, c_noise: Tensor) -> Tensor:
        """The place of c_noise (B,) in the table, float32 in [0, T - 1]."""
        value, table = c_noise.double().contiguous(), self.c_noise_table
        below = (torch.searchsorted(table, value) - 1).clamp(0, len(table) - 2)
        place = (below + (value - table[below]) / (table[below + 1] - table[below])).clamp(0, len(table) - 1)
        whole = place.round()
        return torch.where((place - whole).abs() < WHOLE * len(table), whole, place).float()


class DDPM(_Indexed):
    """[sin, cos] of index f_i, f_i = 10000^(-i/(half - 1)) (Ho et al. 2020, arXiv:2006.11239, their code)."""

    def forward(self, c_noise: Tensor, channels: int) -> Tensor:
        angles = self.index(c_noise)[:, None] * ladder(channels // 2, channels // 2 - 1, c_noise.device)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ADM(_Indexed):
    """[cos, sin] of index f_i, f_i = 10000^(-i/half) (Nichol and Dhariwal 2021, arXiv:2102.09672, their code; ADM and
    DiT use it too). The index is the table's own, not rescaled to 1,000 where T is another number."""

    def forward(self, c_noise: Tensor, channels: int) -> Tensor:
        angles = self.index(c_noise)[:, None] * ladder(channels // 2, channels // 2, c_noise.device)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Dead(NoiseEmbedding):
    """Zeros: the network is not told the noise level, to see what it needs it for (Sun et al. 2025,
    arXiv:2502.13129)."""

    def forward(self, c_noise: Tensor, channels: int) -> Tensor:
        return torch.zeros(len(c_noise), channels, dtype=torch.float32, device=c_noise.device)


def ladder(count: int, last: int, device: torch.device) -> Tensor:
    """10000^(-i/last) for i = 0..count-1, float32 whatever the default dtype; made where it is used and not a buffer,
    which bf16-true would round."""
    i = torch.arange(count, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10_000) * i / last)
