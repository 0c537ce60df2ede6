"""What a walk does not depend on: the scale of its levels, and which of two names it goes by; and its ends."""

import pytest
import torch
from torch import Tensor

from denoiselab.rng import Noise
from denoiselab.sampler import Rung, Walk
from denoiselab.schedule import RATIO, Cosine, Schedule
from exact import OPTIONS, Scaled, every, relative, triangle
from walks import Unsure, addressed, option, schedule_of


class Power(Schedule):
    """A schedule without points that reaches the data itself, and noise but for a share."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t = 1 - (1 - self.share) * t**3
        return alpha_t, (1 - alpha_t**2).sqrt()


VARIANTS = {"ddim": [{"eta": 0.0}, {"eta": 1.0}], "ddpm": [{"variance": "fixed_small"}, {"variance": "fixed_large"}]}


@every("sampler", "schedule")
def test_the_scale_of_the_levels_does_not_matter(sampler, schedule):
    """Variance exploding without k. The denoiser is exact at any scale; noise is addressed."""
    levels, denoiser = schedule_of(schedule), Unsure(triangle())
    for spacing in OPTIONS["spacing"]:
        for arguments in VARIANTS.get(sampler, [{}]):
            found = option(sampler, spacing, 13, **arguments)
            expected = found(denoiser, levels, addressed(4, 2))
            for k in (0.1, 80.0, None):
                scaled = found(denoiser, Scaled(levels, k), addressed(4, 2))
                assert relative(scaled, expected) < 1e-8, (spacing, arguments, k)


@every("spacing", "schedule")
def test_ddim_with_all_its_noise_is_ddpm_with_small_variance(spacing, schedule):
    for steps in (1, 2, 20):
        ddim, ddpm = option("ddim", spacing, steps, eta=1.0), option("ddpm", spacing, steps, variance="fixed_small")
        walks = (found.walk(triangle(), schedule_of(schedule), addressed(8, 2)) for found in (ddim, ddpm))
        for one, other in zip(*walks, strict=True):
            torch.testing.assert_close(one.x_t, other.x_t, rtol=0, atol=1e-7)


@every("sampler", "spacing")
def test_a_schedule_that_reaches_the_data_can_be_sampled(sampler, spacing):
    """The last noisy level may be free of noise."""
    x_0 = option(sampler, spacing, 10)(Unsure(triangle()), Power(0.01), addressed(8, 2))
    assert x_0.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize(
    ("name", "arguments"), [("ddim", {}), ("ddim", {"eta": 0.3}), ("ddim", {"eta": 1.0}), ("ddpm", {})]
)
def test_a_first_step_from_nothing_but_noise_is_finite(name, arguments, alpha):
    """At any pair of levels, where sigma_s^2 - d^2 is nearly zero and must not be rounded to less."""
    found, x_t = option(name, **arguments), torch.ones(1, 1, dtype=torch.float64)
    walk = Walk(lambda x, *level: 0 * x, Cosine(), lambda: 0 * x_t)
    draws = torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma_s, sigma_t in (80 * draws).sort(1).values.tolist():
        t, s = Rung(max(alpha, sigma_t / RATIO), sigma_t), Rung(0.5, sigma_s)
        assert found.step(walk, x_t, t, s).isfinite().all(), (sigma_t, sigma_s)


@every("sampler")
def test_a_sample_does_not_depend_on_its_batch(sampler):
    """In float32, along levels of the trained schedule. Adaptive steps depend on it, within their tolerances."""
    found, denoiser = option(sampler, steps=20), Unsure(triangle())
    whole = found(denoiser, Cosine(), Noise(5, range(9), (2,)))
    for ids in ([0], [4, 5, 6], [8, 1]):
        part = found(denoiser, Cosine(), Noise(5, ids, (2,)))
        torch.testing.assert_close(part, whole[ids], rtol=0, atol=1e-5 if found.nfe else 1e-4)
    assert (found(denoiser, Cosine(), Noise(6, range(9), (2,))) - whole).abs().max() > 0.1
