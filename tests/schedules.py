"""What tests of schedules share: tables as diffusers names them, their betas, and timings that were learned."""

import math

import pytest
import torch
from torch import Tensor

from denoiselab.schedule import RATIO, Adaptive, Discrete, Schedule

HELD = 2 * math.log(RATIO)
TABLES = pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "sigmoid_beta", "sigmoid"])
DIFFUSERS = pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("sigmoid_beta", {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
    ],
    ids=["linear", "cosine", "scaled_linear", "sigmoid_beta"],
)


def points(n: int = 1000) -> Tensor:
    """The times of a table's T points."""
    return torch.arange(n, dtype=torch.float64) / (n - 1)


def betas(schedule: Discrete) -> Tensor:
    """The table's betas, from its levels."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule(points(schedule.points or 0)).alpha ** 2])
    return 1 - abar[1:] / abar[:-1]


def gaussian(log_snr: Tensor, std: float = 0.5) -> Tensor:
    """SNR mse / 2 of the exact denoiser of data N(0, std^2): the bound's density per nat of log-SNR."""
    return ((log_snr + 2 * math.log(std)).sigmoid()) / 2


def gaussian_bound(log_snr: Tensor, std: float = 0.5) -> Tensor:
    """Its antiderivative."""
    return torch.nn.functional.softplus(log_snr + 2 * math.log(std)) / 2


def taught(schedule: Schedule, updates: int = 1000, batch: int = 256, loss=None, noise: float = 0.3, **arguments):
    """An Adaptive that has seen that many batches of noisy errors: the bound's of Gaussian data, or a known loss."""
    arguments = {"carries": "loss" if loss else "vlb", "warm_up": 50, "every": 50, "decay": 0.99} | arguments
    found, g = Adaptive(schedule, **arguments), torch.Generator().manual_seed(0)
    for _ in range(updates):
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch).clamp_max(1 - 2**-24)
        factor = (noise * torch.randn(batch, generator=g) - noise**2 / 2).exp()  # of mean 1
        value = found.log_snr(t)
        mse = 2 * gaussian(value) * (-value).exp() * factor
        losses = loss(found.retimed(t.double())).float() * factor if loss else torch.ones(batch)
        found.update(t, losses, mse)
    return found
