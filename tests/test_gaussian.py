"""The Gaussians of one reverse step: divergence, density, bins and the point before."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from denoiselab.gaussian import (
    discretised_gaussian_nll,
    gaussian_kl,
    gaussian_nll,
    log_ndtr,
    log_snr_before,
    point_before,
)
from denoiselab.schedule import Schedule
from exact import every, make, normals


def test_the_divergence_and_the_density_are_those_of_torch():
    mean_q, mean_p, log_q, log_p = (3 * normals(500, seed=seed) for seed in range(4))
    q, p = Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp())
    torch.testing.assert_close(gaussian_kl(mean_q, log_q, mean_p, log_p), kl_divergence(q, p), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gaussian_nll(mean_q, mean_p, log_p), -p.log_prob(mean_q), rtol=1e-12, atol=1e-12)
    assert (gaussian_kl(mean_q, log_q, mean_q, log_q) == 0).all()


@pytest.mark.parametrize("bins", [2, 17, 256])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.013, 0.9999, 2.0])
@pytest.mark.parametrize("log_variance", [-14.0, -9.0, -2.0, 4.0])
def test_the_masses_of_all_levels_add_up_to_one(bins, mean, log_variance):
    x = torch.linspace(-1, 1, bins, dtype=torch.float64)
    nll = discretised_gaussian_nll(x, torch.tensor(mean).double(), torch.tensor(log_variance).double(), bins)
    assert nll.isfinite().all()
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_a_bins_mass_is_the_difference_of_distribution_functions():
    """The ends reach to infinity; where bins are narrow, it is the density times their width."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    p = Normal(torch.tensor(0.2).double(), torch.tensor(0.4).double())
    log_variance = 2 * p.scale.log()
    upper, lower = p.cdf(x + 1 / 255), p.cdf(x - 1 / 255)
    upper[-1], lower[0] = 1, 0
    nll = discretised_gaussian_nll(x, p.mean, log_variance)
    torch.testing.assert_close((-nll).exp(), upper - lower, rtol=1e-10, atol=0)
    dense = gaussian_nll(x, p.mean, log_variance) - math.log(2 / 255)
    assert (nll - dense)[1:-1].abs().max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_of_the_distribution_function_has_the_gradient_of_its_tail(dtype):
    """The hazard phi/Phi, which tends to -x - 1/x."""
    x = torch.tensor([-1e7, -1e4, -300, -30, -10], dtype=dtype, requires_grad=True)
    log_ndtr(x).sum().backward()
    torch.testing.assert_close(x.grad, (-x - 1 / x).detach(), rtol=3e-4, atol=0)
    z = torch.linspace(-8, 8, 161, dtype=dtype, requires_grad=True)
    log_ndtr(z).sum().backward()
    z64 = z.detach().double()
    hazard = (Normal(0.0, 1.0).log_prob(z64) - torch.special.log_ndtr(z64)).exp()
    torch.testing.assert_close(z.grad.double(), hazard, rtol=2e-4, atol=0)
    torch.testing.assert_close(log_ndtr(z), torch.special.log_ndtr(z), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_decoder_is_finite_with_its_gradients_far_from_the_data(dtype):
    """Thousands of standard deviations away, on either side, where masses themselves are 0."""
    x = torch.linspace(-1, 1, 256, dtype=dtype)[:, None]
    mean = torch.tensor([-1e4, -30, -1, 0, 1, 30, 1e4], dtype=dtype).requires_grad_()
    log_variance = torch.tensor(-10.0, dtype=dtype, requires_grad=True)
    nll = discretised_gaussian_nll(x, mean, log_variance)
    nll.sum().backward()
    assert nll.isfinite().all()
    assert (nll >= 0).all()
    assert mean.grad.isfinite().all()
    assert log_variance.grad.isfinite()
    away = (x - mean).abs() > 2
    dense = (((x - mean).abs() - 1 / 255) ** 2 / 2 * (10 * torch.ones((), dtype=dtype)).exp()).expand_as(nll)
    inner = away & ((x.abs() < 1) & (mean.abs() > 1))
    torch.testing.assert_close(nll[inner], dense[inner], rtol=1e-3, atol=0)


def points(schedule: Schedule, *index: int) -> Tensor:
    """Times of 1-indexed points, (n, 1)."""
    last = (schedule.points or 1000) - 1
    return torch.tensor([(i - 1) / last for i in index], dtype=torch.float64)[:, None]


@every("schedule")
def test_the_point_before(schedule):
    found = make("schedule", schedule)
    t = points(found, 2, 3, 500, 1000)
    s, first = point_before(found, t, 1000)
    torch.testing.assert_close(s, points(found, 1, 2, 499, 999).clamp_min(found.earliest), rtol=0, atol=1e-15)
    assert not first.any()
    at_start = torch.tensor([found.earliest, 0.4 / 999]).double().clamp_min(found.earliest)
    assert (log_snr_before(found, at_start, 1000)[at_start < 0.5 / 999] == math.inf).all()
    assert (log_snr_before(found, t, 1000) > found.log_snr(t)).all()
