"""Inverse cumulative distributions against the densities that their papers state."""

import math

import pytest
import torch
from torch import Tensor

from denoiselab.curve import Curve
from denoiselab.schedule import Linear
from denoiselab.timesteps import FromCurve, Timesteps
from exact import every, make, middles, one


class TestDensities:
    """Each inverse cumulative distribution against the density that its paper states: p(t(u)) dt/du = 1."""

    def slope(self, found: Timesteps) -> tuple[Tensor, Tensor]:
        u = middles(500).requires_grad_()
        t = found.icdf(u, one("schedule", "cosine"))
        (slope,) = torch.autograd.grad(t.sum(), u)
        return t.detach(), slope

    @pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (-0.5, 1.4), (1.0, 0.6)])
    def test_logit_normal(self, loc, scale):
        t, slope = self.slope(make("timesteps", "logit_normal", loc=loc, scale=scale))
        p = (-((t.logit() - loc) ** 2) / (2 * scale**2)).exp() / (scale * math.sqrt(2 * math.pi) * t * (1 - t))
        torch.testing.assert_close(p * slope, torch.ones_like(t), rtol=1e-9, atol=0)
        assert make("timesteps", "logit_normal", loc=loc).icdf(
            torch.tensor([0.5]).double(), Linear()
        ).item() == pytest.approx(1 / (1 + math.exp(-loc)))

    @pytest.mark.parametrize("s", [-1.0, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
    def test_mode(self, s):
        v = middles(200)
        found = make("timesteps", "mode", s=s).icdf(1 - v, Linear())
        published = 1 - v - s * ((math.pi / 2 * v).cos().square() - 1 + v)
        torch.testing.assert_close(found, published, rtol=1e-12, atol=1e-12)
        t = make("timesteps", "mode", s=s).icdf(middles(100_000), Linear())
        assert (t.diff() > -1e-15).all()

    def test_mode_is_refused_where_it_is_not_monotone(self):
        for s in (-1.01, 1.76):
            v = middles(10_000)
            assert ((1 - v - s * ((math.pi / 2 * v).cos().square() - 1 + v)).diff() > 0).any()
            with pytest.raises(ValueError, match=r"s=.*where the map is monotone"):
                make("timesteps", "mode", s=s)

    @pytest.mark.parametrize(("tau", "k"), [(0.7, 5.0), (0.3, 2.0), (0.5, 1.0)])
    def test_speed(self, tau, k):
        t, slope = self.slope(make("timesteps", "speed", tau=tau, k=k))
        p = torch.where(t < tau, k * torch.ones_like(t), 1.0) / (1 + tau * (k - 1))
        torch.testing.assert_close(p * slope, torch.ones_like(t), rtol=1e-9, atol=0)

    @every("schedule")
    def test_lognormal_is_the_same_over_levels_on_every_schedule(self, schedule):
        """Between the schedule's ends; what lies beyond is at the ends."""
        levels, u = one("schedule", schedule), middles(2000)
        t = make("timesteps", "lognormal", sigma_data=0.8).icdf(u, levels)
        log_sigma = -1.2 + math.log(0.8 / 0.5) + 1.2 * torch.special.ndtri(u)
        ends = -levels.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)) / 2
        inside = (log_sigma > ends[0] + 1e-3) & (log_sigma < ends[1] - 1e-3)
        assert inside.sum() > 1000
        torch.testing.assert_close(-levels.log_snr(t[inside]) / 2, log_sigma[inside], rtol=0, atol=1e-6)
        assert (t[log_sigma < ends[0] - 1e-3] < 1e-9).all()
        assert (t[log_sigma > ends[1] + 1e-3] > 1 - 1e-9).all()

    def test_a_curve_is_the_density(self):
        curve = Curve([0.1, 0.4, 0.9], [3, 1, 2])
        t, slope = self.slope(FromCurve(curve))
        torch.testing.assert_close(curve(t) / curve.total * slope, torch.ones_like(t), rtol=1e-9, atol=0)

    def test_a_corrected_curve_leaves_the_objective_alone(self):
        found, levels = FromCurve(Curve([0, 0.3, 1], [5, 1, 0.5]), correct=True), Linear()
        t = found.icdf(middles(100_000), levels)
        assert (found.weights(t, levels) * (-3 * t).exp()).mean().item() == pytest.approx(
            (1 - math.exp(-3)) / 3, rel=1e-6
        )
