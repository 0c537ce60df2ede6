"""Schedules agree on the bound, which depends on the levels at its ends alone."""

import pytest
import torch
from torch import Tensor

from denoiselab.schedule import Cosine, Flow, Schedule
from exact import OPTIONS, make, normals, triangle
from schedules import gaussian, gaussian_bound, taught


def between(found: Schedule, cleanest: float, noisiest: float, n: int) -> tuple[Tensor, float]:
    """n times even between the schedule's times of two log-SNRs, and how far these are apart."""
    start, end = found.inverse(torch.tensor([cleanest, noisiest]).double()).tolist()
    return start + (torch.arange(n).double() + 0.5) / n * (end - start), end - start


def any_schedule() -> dict[str, Schedule]:
    options: dict[str, Schedule] = {name: make("schedule", name) for name in OPTIONS["schedule"]}
    return {**options, "taught cosine": taught(Cosine(), updates=200), "taught flow": taught(Flow(), updates=200)}


def test_the_bound_of_gaussian_data_is_the_same_along_every_schedule():
    """The mean of SNR rate mse / 2 over uniform t between two levels, in closed form."""
    ends = torch.tensor([-5.0, 7.0]).double()
    expected = gaussian_bound(ends).diff().item()
    for name, found in any_schedule().items():
        t, length = between(found, 7.0, -5.0, 20_000)
        density = gaussian(found.log_snr(t)) * found.rate(t)
        assert length * density.mean().item() == pytest.approx(expected, rel=1e-3), name


def test_the_bound_of_a_mixture_is_the_same_along_every_schedule():
    """With noisy samples and their exact posterior variance, against an integral over the log-SNR."""
    mixture, n = triangle(), 40_000
    x_0, _ = mixture.draw(n, seed=1)
    eps, shuffled = normals(n, 2, seed=2), torch.randperm(n, generator=torch.Generator().manual_seed(3))

    def snr_mse(log_snr: Tensor) -> Tensor:
        alpha_t, sigma_t = (log_snr.sigmoid().sqrt()[shuffled, None], (-log_snr).sigmoid().sqrt()[shuffled, None])
        _, variance = mixture.posterior(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t)
        return log_snr[shuffled].exp() * variance / 2

    expected = 12 * snr_mse(-5 + 12 * (torch.arange(n).double() + 0.5) / n).mean().item() / 2
    for name, found in any_schedule().items():
        t, length = between(found, 7.0, -5.0, n)
        bound = length * (snr_mse(found.log_snr(t)) * found.rate(t)[shuffled]).mean().item() / 2
        assert bound == pytest.approx(expected, rel=0.01), name
