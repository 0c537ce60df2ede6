"""A timing that is learned: equal steps come to carry equal shares."""

import math

import pytest
import torch
from torch import Tensor

from denoiselab.schedule import EDM, GVP, VE, VP, Adaptive, Cosine, Flow, Linear, ZeroTerminal
from exact import every, grid, make
from schedules import HELD, gaussian_bound, taught


def bump(u: Tensor) -> Tensor:
    return 0.05 + (-(((u - 0.3) / 0.1) ** 2)).exp()


def bump_carried(u: Tensor) -> Tensor:
    return 0.05 * u + 0.1 * math.sqrt(math.pi) / 2 * torch.erf((u - 0.3) / 0.1)


def unevenness(carried: Tensor) -> float:
    """Of what is carried by equal steps, whose cumulated amounts are given: standard deviation over mean."""
    step = carried.diff()
    return (step.std(correction=0) / step.mean()).abs().item()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), VE(), EDM(), Flow(), GVP(), ZeroTerminal(Linear())])
def test_equal_steps_come_to_carry_equal_shares_of_the_bound(schedule):
    found = taught(schedule)
    for steps in (10, 50):
        before = unevenness(gaussian_bound(Adaptive(schedule).log_snr(grid(steps + 1))))
        after = unevenness(gaussian_bound(found.log_snr(grid(steps + 1))))
        assert after < 0.2 * before
        assert after < 0.25


@pytest.mark.parametrize("schedule", [Cosine(), Flow()])
def test_equal_steps_come_to_carry_equal_shares_of_a_known_loss(schedule):
    found = taught(schedule, loss=bump)
    before, after = (unevenness(bump_carried(s.retimed(grid(21)))) for s in (Adaptive(schedule), found))
    assert before > 1
    assert after < 0.1 * before


@pytest.mark.parametrize("schedule", [Linear(), VP(), Flow()])
def test_constant_density_leaves_the_timing_as_it_is(schedule):
    found = taught(schedule, updates=100, loss=torch.ones_like, noise=0.0)
    torch.testing.assert_close(found.knots, Adaptive(schedule).knots, rtol=1e-9, atol=1e-12)
    assert found.updates == 100


def test_constant_density_of_the_bound_leaves_the_timing_as_it_is():
    found = Adaptive(Cosine(), warm_up=0, every=1)
    t = (torch.arange(100_000).double() + 0.5) / 100_000
    found.update(t, torch.ones_like(t), 2 / (found.log_snr(t).exp() * found.rate(t)))
    torch.testing.assert_close(found.retimed(grid()), grid(), rtol=0, atol=1e-4)


def test_what_is_learned_does_not_depend_on_how_times_are_drawn():
    """Averages per level, not sums."""
    found = Adaptive(Cosine(), carries="loss", warm_up=0, every=1, floor=1e-3)
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    timings = []
    for t in (u, u**2):
        other = Adaptive(Cosine(), carries="loss", warm_up=0, every=1, floor=1e-3)
        other.update(t, bump(found.retimed(t)), torch.ones_like(t))
        timings.append(other.retimed(grid()))
    torch.testing.assert_close(*timings, rtol=0, atol=2e-3)
    assert (timings[0] - grid()).abs().max() > 0.2


@every("schedule")
def test_a_learned_timing_is_a_schedule(schedule):
    """As for the options, between the ends that it had."""
    other = make("schedule", schedule)
    found = taught(other, updates=60, batch=2000)
    assert (found.log_snr(grid(20_001)).diff() < 0).all()
    ends = torch.tensor([other.earliest, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.log_snr(grid(2)), other.log_snr(ends), rtol=1e-12, atol=1e-9)
    assert found.earliest == 0
    inside = grid(1001)[1:-1]
    torch.testing.assert_close(found.inverse(found.log_snr(inside)), inside, rtol=0, atol=1e-9)
    extremes = found.inverse(torch.tensor([1e3, -1e3]))
    torch.testing.assert_close(extremes, grid(2), rtol=0, atol=1e-15)
    t = (found.knots[1:] + found.knots[:-1]) / 2
    if other.points is None:
        h = found.knots.diff() / 1e4
        slope = (found.log_snr(t - h) - found.log_snr(t + h)) / (2 * h)
        free = found.log_snr(t).abs() < HELD - 1
        assert free.sum() > 100
        torch.testing.assert_close(found.rate(t)[free], slope[free], rtol=1e-4, atol=0)
    assert (found.rate(grid()) > 0).all()
    assert found.rate(grid().float()).isfinite().all()


@pytest.mark.parametrize("carries", ["vlb", "loss"])
def test_what_was_learned_survives_a_checkpoint(carries):
    found, other = taught(Cosine(), updates=120, loss=bump if carries == "loss" else None), None
    other = Adaptive(Cosine(), carries=carries, warm_up=50, every=50, decay=0.99)
    untaught = other.fingerprint
    other.load_state_dict(found.state_dict())
    assert found.fingerprint == other.fingerprint != untaught
    t = torch.rand(256, generator=torch.Generator().manual_seed(1))
    for _ in range(40):  # beyond the next change
        for one in (found, other):
            one.update(t, t + 1, t)
    assert found.fingerprint == other.fingerprint
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in found.state_dict().items())
    assert found.updates == 160


def test_the_timing_changes_at_its_updates_alone():
    found, t = Adaptive(Cosine(), carries="loss", warm_up=7, every=3), torch.rand(64)
    changed = []
    for update in range(1, 19):
        before = found.knots.clone()
        found.update(t, 1 + t * update, t)
        if not torch.equal(before, found.knots):
            changed.append(update)
    assert changed == [9, 12, 15, 18]


def test_old_losses_are_forgotten():
    found, t = Adaptive(Cosine(), carries="loss", decay=0.9, warm_up=0, every=1), grid(5000)
    found.update(t, bump(t), t)
    bumped = found.knots.clone()
    for _ in range(100):
        found.update(t, bump(1 - found.retimed(t)), t)
    fresh = Adaptive(Cosine(), carries="loss", decay=0.0, warm_up=0, every=1)
    fresh.update(t, bump(1 - t), t)
    assert (found.knots - bumped).abs().max() > 0.2
    torch.testing.assert_close(found.knots, fresh.knots, rtol=0, atol=1e-3)


def test_losses_of_nothing_leave_the_timing_as_it_is():
    found, t = Adaptive(Flow(), carries="loss", warm_up=0, every=1), torch.rand(8)
    found.update(t, torch.zeros(8), torch.zeros(8))
    torch.testing.assert_close(found.knots, Adaptive(Flow()).knots)
