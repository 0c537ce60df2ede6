"""DDIM and DDPM, with and without a learned variance: diffusers' schedulers, and Euler's method."""

import itertools

import pytest
import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.rng import Noise
from denoiselab.sampler import Walk
from denoiselab.schedule import Cosine, Discrete
from exact import White, every, make, normals, triangle
from walks import Straight, Unsure, addressed, eps_of, option, schedule_of, spacing_of

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
THEIRS = pytest.mark.parametrize("betas", [LINEAR, {"beta_schedule": "squaredcos_cap_v2"}], ids=["linear", "cosine"])


def in_float64(reference):
    """diffusers' scheduler with its own betas multiplied up in float64: its float32 product is off by 1e-5."""
    betas = reference.betas.double()
    reference.betas, reference.alphas = betas, 1 - betas
    reference.alphas_cumprod = reference.alphas.cumprod(0)
    return reference


def table_of(reference) -> Discrete:
    return Discrete(reference.betas)


@THEIRS
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_diffusers_takes_the_same_ddpm_steps(betas, variance):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**betas, variance_type=variance, prediction_type="sample", clip_sample=False)
    schedule, found = table_of(in_float64(reference)), option("ddpm", "trailing", 1000, variance=variance)
    levels = found.levels(schedule)
    for index in (999, 998, 750, 500, 100, 10, 2, 1, 0):
        x_t, x_0_hat = normals(4, 8, seed=1), normals(4, 8, seed=2)
        theirs = reference.step(x_0_hat, index, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
        t, s = levels[999 - index], levels[1000 - index]
        walk = Walk(lambda *_, y=x_0_hat: y, schedule, lambda: normals(4, 8, seed=7))
        ours = found.step(walk, x_t, t, s) if s.sigma else found.finish(walk, x_t, t)
        assert (ours - theirs).abs().max() <= 1e-9, index


@THEIRS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 200])
def test_diffusers_walks_the_same_ddim_walk(betas, eta, steps):
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(
        **betas,
        timestep_spacing="leading",
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type="sample",
    )
    reference.set_timesteps(steps)
    schedule, found, exact = table_of(in_float64(reference)), option("ddim", "leading", steps, eta=eta), triangle()
    source = addressed(8, 2)
    x = found.levels(schedule)[0].sigma * source()
    for index in reference.timesteps.tolist():
        alpha, sigma = schedule(torch.full((8, 1), index / 999, dtype=torch.float64))
        noise = source() if eta and index else None
        x = reference.step(exact(x, alpha, sigma), index, x, eta=eta, variance_noise=noise).prev_sample
    assert (found(exact, schedule, addressed(8, 2)) - x).abs().max() <= 1e-8


@THEIRS
def test_diffusers_as_shipped_walks_the_same_ddim_walk(betas):
    """In its own float32, with the options of conf/."""
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(
        **betas, timestep_spacing="leading", set_alpha_to_one=True, clip_sample=False, prediction_type="sample"
    )
    reference.set_timesteps(50)
    schedule = schedule_of("linear" if "beta_start" in betas else "cosine")
    found, exact = option("ddim", "leading", 50), triangle()
    x = found.levels(schedule)[0].sigma * Noise(0, range(8), (2,))()
    for index in reference.timesteps.tolist():
        alpha, sigma = schedule(torch.full((8, 1), index / 999))
        x = reference.step(exact(x, alpha, sigma), index, x).prev_sample
    assert (found(exact, schedule, Noise(0, range(8), (2,))) - x).abs().max() <= 1e-5


# Euler is DDIM


@every("spacing", "schedule")
def test_ddim_is_eulers_method_in_sigma_over_alpha_and_in_flow_time(spacing, schedule):
    levels, exact, x = schedule_of(schedule), triangle(), normals(8, 2)
    found = make("sampler", "euler", spacing=spacing_of(spacing), steps=9)
    rungs = found.levels(levels)
    r = [rung.ratio for rung in rungs]
    y = x * r[0]  # x/alpha
    for r_t, r_s in itertools.pairwise(r):
        y = y + (r_s - r_t) * eps_of(exact, y, 1.0, r_t)
    tau = [ratio / (1 + ratio) for ratio in r]
    z = x * tau[0]  # x/(alpha + sigma)
    for t, s in itertools.pairwise(tau):
        eps = eps_of(exact, z, 1 - t, t)
        z = z + (s - t) * (eps - (z - t * eps) / (1 - t))
    sample = found(exact, levels, x)
    tolerance = 1e-12 + 1e-15 * r[0]
    assert (sample - y).abs().max() < tolerance
    assert (sample - z).abs().max() < tolerance


def test_euler_is_exact_where_paths_are_straight():
    """Data that is one point: a single step finds it, from any level."""
    for steps in (1, 5):
        x_0 = make("sampler", "euler", steps=steps)(White(0.7, 1e-9), Straight(), normals(16, 1))
        assert (x_0 - 0.7).abs().max() < 1e-8


@pytest.mark.parametrize("steps", [4, 10, 25, 50])
@pytest.mark.parametrize("kind", ["leading", "trailing"])
def test_diffusers_walks_the_same_euler_walk(steps, kind):
    from diffusers import EulerDiscreteScheduler

    reference = EulerDiscreteScheduler(**LINEAR, timestep_spacing=kind)
    reference.set_timesteps(steps)
    exact, x = triangle(), normals(8, 2).float()
    y = x * reference.sigmas[0]
    for t in reference.timesteps:
        y = reference.step(eps_of(exact, y, 1.0, reference.sigmas[reference.step_index or 0].item()), t, y).prev_sample
    found = make("sampler", "euler", spacing=spacing_of(kind), steps=steps)
    assert (found(exact, schedule_of("linear"), x) - y).abs().max() <= 1e-5


# Learned variance


class Sure:
    """A denoiser whose answer and variance are given."""

    has_variance = True

    def __init__(self, x_0: Tensor, variance: Tensor):
        self.found = Outputs(x_0, variance)

    def outputs(self, *arguments, **cond) -> Outputs:
        return self.found

    def __call__(self, *arguments, **cond) -> Tensor:
        return self.found.x_0


@THEIRS
def test_diffusers_takes_the_same_steps_of_learned_variance(betas):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**betas, variance_type="learned_range", prediction_type="sample", clip_sample=False)
    reference.betas = reference.betas.double()
    reference.alphas = 1 - reference.betas
    reference.alphas_cumprod = reference.alphas.cumprod(0)
    schedule, found = Discrete(reference.betas), make("sampler", "ddpm_learned", spacing=make("spacing", "trailing"))
    found.steps = 1000
    levels = found.levels(schedule)
    x_t, x_0_hat = normals(4, 3, 2, 2, seed=1), normals(4, 3, 2, 2, seed=2)
    v = torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for index in (999, 998, 750, 500, 100, 10, 2, 1, 0):
        answer = torch.cat([x_0_hat, 2 * v - 1], 1)
        theirs = reference.step(answer, index, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
        walk = Walk(Sure(x_0_hat, v), schedule, lambda: normals(4, 3, 2, 2, seed=7))
        t, s = levels[999 - index], levels[1000 - index]
        ours = found.step(walk, x_t, t, s) if s.sigma else found.finish(walk, x_t, t)
        assert (ours - theirs).abs().max() <= 1e-9, index


@pytest.mark.parametrize(("v", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_bounds_of_the_learned_variance_are_ddpms(v, variance):
    ddpm, found = option("ddpm", "trailing", 20, variance=variance), option("ddpm_learned", "trailing", 20)
    expected = ddpm(triangle(), Cosine(), addressed(16, 2))
    sample = found(Unsure(triangle(), v), Cosine(), addressed(16, 2))
    torch.testing.assert_close(sample, expected, rtol=0, atol=1e-12)


def test_a_denoiser_without_a_variance_is_refused_in_a_line():
    found = make("sampler", "ddpm_learned")
    for refused in (lambda: found.check(White()), lambda: found(White(), Cosine(), normals(2, 1))):
        with pytest.raises(ValueError, match=r"^LearnedDDPM needs a variance, [^\n]*loss=learned_hybrid[^\n]*$"):
            refused()
    found.check(Sure(normals(1), normals(1)))
