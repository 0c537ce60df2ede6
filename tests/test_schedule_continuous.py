"""Schedules in closed form against their papers and diffusers."""

import math

import pytest
import torch

from denoiselab.schedule import EDM, GVP, VE, VP, Flow, Linear, ZeroTerminal
from exact import grid


def test_vp_in_closed_form():
    """And its rate, beta(t)/sigma_t^2."""
    t = grid(1001)[1:]
    alpha_t, sigma_t = VP(0.1, 20)(t)
    torch.testing.assert_close(alpha_t**2, (-0.1 * t - 9.95 * t**2).exp(), rtol=1e-13, atol=0)
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(VP(0.1, 20).rate(t), (0.1 + 19.9 * t) / sigma_t**2, rtol=1e-10, atol=0)
    early = torch.tensor(1e-9).double()
    assert VP(0.1, 20)(early).sigma.item() == pytest.approx(1e-5, rel=1e-7)  # sqrt(beta_min t), nothing cancelled


def test_many_betas_are_vp():
    """Linear's table tends to it as T grows."""
    t, far = grid()[1:], []
    for n in (1000, 10_000):
        far.append((Linear(n)(t).alpha - VP()(t).alpha).abs().max())
    assert far[1] < far[0] / 5
    assert far[1] < 1e-3


def test_ve_is_even_in_log_sigma():
    t = grid()
    alpha_t, sigma_t = VE(0.01, 50)(t)
    assert (alpha_t == 1).all()
    torch.testing.assert_close(sigma_t.log(), math.log(0.01) + t * math.log(5000))
    torch.testing.assert_close(VE(0.01, 50).rate(t), torch.full_like(t, 2 * math.log(5000)))


def test_edm_is_even_in_a_root_of_sigma():
    t = grid()
    alpha_t, sigma_t = EDM(0.002, 80, 7)(t)
    assert (alpha_t == 1).all()
    torch.testing.assert_close(sigma_t ** (1 / 7), 0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7)))
    torch.testing.assert_close(sigma_t[[0, -1]], torch.tensor([0.002, 80]).double())


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_flow_is_straight_and_its_shift_multiplies_sigma_over_alpha(shift):
    t = grid()[1:-1]
    alpha_t, sigma_t = Flow(shift)(t)
    torch.testing.assert_close(alpha_t + sigma_t, torch.ones_like(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(sigma_t / alpha_t, shift * t / (1 - t), rtol=1e-13, atol=0)
    torch.testing.assert_close(Flow(shift).rate(t), 2 / (t * (1 - t)), rtol=1e-10, atol=0)
    assert torch.equal(Flow()(t).sigma, t)


def test_gvp_goes_round_the_circle_at_even_speed():
    t = grid()[1:-1]
    alpha_t, sigma_t = GVP()(t)
    torch.testing.assert_close(torch.atan2(sigma_t, alpha_t), t * math.pi / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.hypot(alpha_t, sigma_t), torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(GVP().rate(t), 2 * math.pi / (math.pi * t).sin(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("schedule", "clean", "noise"),
    [
        (VP(), True, False),
        (Flow(), True, True),
        (Flow(3.0), True, True),
        (GVP(), True, True),
        (ZeroTerminal(Linear()), False, True),
        (ZeroTerminal(VP()), True, True),
        (VE(), False, False),
    ],
)
def test_ends_that_are_data_or_noise_are_so_exactly(schedule, clean, noise):
    alpha_t, sigma_t = schedule(torch.tensor([0.0, 1.0]).double())
    assert (sigma_t[0] == 0) == clean
    assert (alpha_t[1] == 0) == noise
    assert alpha_t[0] > 0
    assert sigma_t[1] > 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_has_the_same_flow(shift):
    """Its 1,000 levels are at t = 1/1000, ..., 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    sigma_t = Flow(shift)(torch.arange(1000, 0, -1).double() / 1000).sigma
    torch.testing.assert_close(sigma_t.float(), reference, rtol=1e-6, atol=0)


def test_diffusers_has_the_same_edm():
    from diffusers import EDMEulerScheduler

    reference = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, rho=7)
    reference.set_timesteps(18)
    sigma_t = EDM(0.002, 80, 7)(torch.linspace(1, 0, 18).double()).sigma
    torch.testing.assert_close(sigma_t.float(), reference.sigmas[:-1], rtol=1e-5, atol=0)
