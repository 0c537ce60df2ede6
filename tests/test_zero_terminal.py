"""Schedules rescaled to end in pure noise."""

import pytest
import torch

from denoiselab.schedule import VP, Flow, ZeroTerminal
from exact import every, grid, make
from schedules import DIFFUSERS, betas, points


@every("schedule")
def test_rescaling_keeps_the_first_level_and_ends_in_noise(schedule):
    """In between, sqrt(abar_t) is shifted and scaled."""
    other = make("schedule", schedule)
    found = ZeroTerminal(other)
    a = {s: s.log_snr(grid()[1:-1]).sigmoid().sqrt() for s in (found, other)}
    first, last = (torch.nn.functional.normalize(torch.stack(other(grid()[[0, -1]])), dim=0)[0]).tolist()
    torch.testing.assert_close(a[found], (a[other] - last) * first / (first - last), rtol=1e-9, atol=1e-12)
    alpha_t, sigma_t = found(grid())
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones(101).double(), rtol=1e-14, atol=0)
    assert found.log_snr(grid()[0]).item() == pytest.approx(other.log_snr(grid()[0]).item(), abs=1e-9)
    assert alpha_t[-1] == 0
    assert found.points == other.points


@DIFFUSERS
def test_diffusers_rescales_the_same(name, theirs):
    from diffusers import DDPMScheduler
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    schedule = make("schedule", name)
    abar = (1 - rescale_zero_terminal_snr(betas(schedule))).cumprod(0)
    alpha_t, sigma_t = ZeroTerminal(schedule)(points())
    torch.testing.assert_close(alpha_t**2, abar, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(sigma_t**2, 1 - abar, rtol=1e-10, atol=1e-15)
    shipped = DDPMScheduler(**theirs, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close((alpha_t**2)[:-1].float(), shipped[:-1], rtol=2e-4, atol=1e-7)  # theirs is in float32


def test_rescaling_loses_no_digits_near_data():
    """1 - alpha^2 of 1e-12 is not the difference of two ones."""
    t = torch.tensor(1e-11).double()
    assert ZeroTerminal(Flow())(t).sigma.item() == pytest.approx(1e-11, rel=1e-9)
    assert ZeroTerminal(VP())(t).sigma.item() == pytest.approx(VP()(t).sigma.item(), rel=1e-2)
