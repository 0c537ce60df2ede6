"""What tests compare with: every option as an object, exact denoisers, and the probability-flow ODE."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import denoiselab
from denoiselab.compose import conf_dir, options
from denoiselab.data import EightGaussians
from denoiselab.sampler import Rung
from denoiselab.schedule import LEAST_RATIO, RATIO, Schedule
from denoiselab.target import Target

OPTIONS = options()


OPEN = {
    "consistency_distillation": "loss.teacher.ckpt",
    "progressive": "loss.teacher.ckpt",
    "autoguidance": "guidance.bad.ckpt",
    "optuna": "sweeper.metric",
}
"""Options that need another run, or a word, and where they are told of it."""


ON_FILES = {
    "torchvision": ["metrics.fd.features.weights"],
    "torchscript": ["metrics.fd.features.weights", "metrics.fd.features.name"],
    "lpips": ["metrics.lpips.weights"],
    "clip_score": ["metrics.clip_score.prompts", "metrics.clip_score.clip.folder"],
}
"""Options that need files of others, and where they are told of them; made in test_features and test_lpips_and_clip."""


def needing(option: str, run: object) -> list[str]:
    """What must be given beside an option."""
    return [f"{key}={run}" for key in ([OPEN[option]] if option in OPEN else ON_FILES.get(option, []))]


def every(*groups: str) -> Callable[[Any], Any]:
    """Parametrize a test by the option names of groups, so that a new file in conf/ is a new test case."""

    def mark(test: Any) -> Any:
        for group in reversed(groups):
            test = pytest.mark.parametrize(group, OPTIONS[group])(test)
        return test

    return mark


@cache
def parts(*overrides: str) -> denoiselab.Parts:
    return denoiselab.build(*overrides, "metrics=none", "callbacks=none")


def own(group: str, name: str) -> dict[str, Any] | None:
    """An option's arguments, read from its file; None where that changes other groups, refers to them or is open."""
    text = (conf_dir() / group / f"{name}.yaml").read_text()
    if re.search(r"^# @package|^defaults:|\$\{|\?\?\?", text, re.MULTILINE):
        return None
    return OmegaConf.to_container(OmegaConf.create(text))  # pyright: ignore[reportReturnType]


@cache
def parts_with(group: str, name: str) -> denoiselab.Parts:
    """The parts of a run with an option; composed only where its file does not say it all, as composing takes long.
    test_compose compares the two."""
    node = own(group, name)
    return parts(f"{group}={name}") if node is None else denoiselab.Parts({**parts().config, group: node})


def make(group: str, name: str, **arguments: Any) -> Any:
    """A new object of an option, some of its arguments and shared parts replaced."""
    found = parts_with(group, name)
    node = {key: arguments.pop(key, value) for key, value in found.config[group].items()}
    return found.make(group, node, **arguments)


one = cache(make)
"""An option's object that is made once, where nothing changes it."""


def grid(n: int = 101) -> Tensor:
    """Times over [0, 1], both ends among them, that are no points of a table of 1,000."""
    return torch.linspace(0, 1, n, dtype=torch.float64)


def middles(n: int) -> Tensor:
    """The middles of n equal parts of [0, 1], (n,)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def times(n: int) -> Tensor:
    """A time in the middle of each of n equal parts of [0, 1], (n, 1)."""
    return middles(n)[:, None]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Scaled(Schedule):
    """The same log-SNRs at the same times, alpha and sigma scaled by k, or at alpha = 1 (variance exploding)
    without k."""

    def __init__(self, schedule: Schedule, k: float | None = None):
        super().__init__()
        self.schedule, self.k, self.points = schedule, k, schedule.points

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = self.schedule.levels(t)
        k = 1 / alpha_t.clamp_min(sigma_t / RATIO) if self.k is None else self.k
        return k * alpha_t, k * sigma_t

    def inverse(self, log_snr: Tensor) -> Tensor:
        return self.schedule.inverse(log_snr)


class White:
    """Data N(mean, std^2 I) and its E[x_0 | x_t]."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        gain = alpha_t * self.std**2 / (alpha_t**2 * self.std**2 + sigma_t**2)
        return self.mean + gain * (x_t - alpha_t * self.mean)

    def flow(self, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        """The probability-flow ODE solved from level t to level s: standardised values stay."""
        z = (x_t - t.alpha * self.mean) / math.hypot(t.alpha * self.std, t.sigma)
        return s.alpha * self.mean + math.hypot(s.alpha * self.std, s.sigma) * z


class Mixture:
    """Equally likely N(centre_k, std^2 I); E[x_0 | x_t], of one mode where a label >= 0 names it."""

    def __init__(self, centres: Tensor, std: float):
        self.centres, self.std = centres.double(), std
        self.half = self.centres.square().sum(1) / 2

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        label = torch.randint(len(self.centres), (n,), generator=g)
        eps = torch.randn((n, self.centres.shape[1]), generator=g, dtype=torch.float64)
        return self.centres[label] + self.std * eps, label

    def posterior(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, D) and variance summed over coordinates (B,) of x_0 given x_t; levels of shape (B, 1)."""
        centres, variance = self.centres.to(x_t.dtype), alpha_t**2 * self.std**2 + sigma_t**2
        away = x_t[:, None] - alpha_t[:, None] * centres  # (B, K, D)
        log_weight = -away.square().sum(-1) / (2 * variance)  # (B, K)
        if label is not None:
            other = (label[:, None] >= 0) & (label[:, None] != torch.arange(len(centres)))
            log_weight = log_weight.masked_fill(other, float("-inf"))
        weight = log_weight.softmax(1)[..., None]  # (B, K, 1)
        means = centres + (alpha_t * self.std**2 / variance)[:, None] * away
        mean = (weight * means).sum(1)
        within = (self.std**2 * sigma_t**2 / variance)[:, 0] * x_t.shape[1]
        return mean, within + (weight * (means - mean[:, None]).square()).sum((1, 2))

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor | None = None) -> Tensor:
        """The posterior's mean, in fewer operations: |x_t|^2 is common to all modes."""
        if label is not None:
            return self.posterior(x_t, alpha_t, sigma_t, label)[0]
        centres, half = self.centres.to(x_t.dtype), self.half.to(x_t.dtype)
        precision = alpha_t / (alpha_t * alpha_t * self.std**2 + sigma_t * sigma_t)
        along = (x_t[:, None] * centres).sum(-1)  # (B, K)
        weight = (precision * (along - alpha_t * half)).softmax(1)
        gain = self.std**2 * precision
        return gain * x_t + (1 - gain * alpha_t) * (weight[..., None] * centres).sum(1)


def triangle() -> Mixture:
    """Three modes in the plane, of unit variance on the whole."""
    centres = torch.tensor([[1.2, 0.1], [-0.9, 0.8], [-0.3, -0.9]], dtype=torch.float64)
    return Mixture(centres, 0.35)


def eight_gaussians() -> Mixture:
    """data=8gaussians as it is diffused, but for the sampling error of its mean and width."""
    width = math.sqrt(EightGaussians.radius**2 / 2 + EightGaussians.std**2)
    return Mixture(EightGaussians(n=8).centres / width, EightGaussians.std / width)


def solve(
    denoiser: Callable[..., Tensor], x_t: Tensor, t: Rung | Sequence[Rung], s: Rung | Sequence[Rung], steps: int
) -> Tensor:
    """The probability-flow ODE from t to s, dy/dlog r = r eps_hat in y = x/alpha, r = sigma/alpha: Runge-Kutta's
    fourth-order method in log r. t and s are levels of the whole batch, or one of each row."""
    first, last = ([level] * len(x_t) if isinstance(level, Rung) else level for level in (t, s))
    start, end = (x_t.new_tensor([[-rung.half_log_snr] for rung in levels]) for levels in (first, last))
    one, h = torch.ones_like(start), (end - start) / steps

    def slope(y: Tensor, log_r: Tensor) -> Tensor:
        return y - denoiser(y, one, log_r.exp())

    y = x_t / x_t.new_tensor([[rung.alpha] for rung in first])
    for i in range(steps):
        log_r = start + i * h
        k_1 = slope(y, log_r)
        k_2 = slope(y + h / 2 * k_1, log_r + h / 2)
        k_3 = slope(y + h / 2 * k_2, log_r + h / 2)
        k_4 = slope(y + h * k_3, log_r + h)
        y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x_t.new_tensor([[rung.alpha] for rung in last]) * y


class ExactNet(nn.Module):
    """A network without weights that makes of (c_in x_t, c_noise), and of nothing else, the y of an exact x_0_hat."""

    def __init__(self, exact: Callable[..., Tensor], target: Target, sigma_data: float = 1.0):
        super().__init__()
        self.exact, self.target, self.sigma_data = exact, target, sigma_data
        self.dtype_like = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        r = (4 * c_noise).exp().view(-1, *[1] * (x.ndim - 1))  # sigma_t/alpha_t
        alpha_t = (self.sigma_data**2 + r**2).rsqrt()  # c_in alpha_t
        sigma_t = r * alpha_t
        x_0_hat = self.exact(x, alpha_t, sigma_t, **cond)
        return self.target(x_0_hat, (x - alpha_t * x_0_hat) / sigma_t, alpha_t, sigma_t)


def noisy_levels(schedule: Schedule, n: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    """(t, alpha_t, sigma_t), each (n, 1), at times where there is both data and noise."""
    t = grid(n)[:, None]
    alpha_t, sigma_t = schedule(t)
    both = (alpha_t * sigma_t > 0)[:, 0]
    return t[both], alpha_t[both], sigma_t[both]


def telling_levels(schedule: Schedule, *targets: Target) -> tuple[Tensor, Tensor, Tensor]:
    """(t, alpha_t, sigma_t), each (n, 1), with data and noise, at which each target says something of x_0: a
    consistency function does not at its end."""
    t, alpha_t, sigma_t = noisy_levels(schedule)
    ends = max((y.sigma_min + LEAST_RATIO for y in targets if hasattr(y, "sigma_min")), default=0.0)
    tells = (sigma_t > ends * alpha_t)[:, 0]
    return t[tells], alpha_t[tells], sigma_t[tells]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
