"""What tests of distillation share: teachers that are exact, a network with one weight, and losses around them."""

import math

import torch
from torch import Tensor, nn

from denoiselab.consistency import Consistency
from denoiselab.denoiser import Denoiser
from denoiselab.loss import ConsistencyDistillation, ConsistencyTraining, Fixed, PseudoHuber
from exact import White

R_MIN = 0.002


class Teacher(nn.Module):
    """An exact denoiser where a trained one is expected."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.weight = exact, nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        return self.exact(*(value.double() for value in (x_t, alpha_t, sigma_t)), **cond).to(x_t.dtype)


class Ends:
    """The consistency function of Gaussian data: where the flow is at r_min."""

    def __init__(self, data: White, r_min: float = R_MIN):
        self.data, self.r_min = data, r_min

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        mean, std = self.data.mean, self.data.std
        z = (x_t - alpha_t * mean) / torch.sqrt((alpha_t * std) ** 2 + sigma_t**2)
        return mean + math.hypot(std, self.r_min) * z


class Wave(nn.Module):
    """A small smooth network with one weight."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return (self.weight * x + c_noise[:, None]).sin()


def wave(target: Consistency | None = None) -> Denoiser:
    return Denoiser(Wave(), target or Consistency())


def training(denoiser: Denoiser, levels=None, distance=None, **arguments) -> ConsistencyTraining:
    levels, distance = levels or Fixed(18), distance or PseudoHuber()
    return ConsistencyTraining(denoiser.target, denoiser, levels, distance, **arguments)


def distillation(teacher, denoiser: Denoiser, n: int = 18, distance=None, **arguments) -> ConsistencyDistillation:
    distance = distance or PseudoHuber()
    return ConsistencyDistillation(Teacher(teacher), denoiser.target, denoiser, Fixed(n), distance, **arguments)
