"""Stochastic DPM-Solver++: its variance, without sampling, and diffusers' and k-diffusion's steps."""

import itertools
import math

import pytest
from torch import Tensor

from denoiselab.rng import Noise
from denoiselab.sampler import Rung, Sampler, Walk
from denoiselab.sampler.base import CLEAN
from denoiselab.sampler.exponential import phi
from denoiselab.schedule import Linear
from dpm import BETAS, NUMBERS, SDE, apart, published, their_path, theirs, walk
from exact import Scaled, White, normals, triangle
from walks import Impulses, moments, schedule_of, slopes


@NUMBERS
@BETAS
def test_diffusers_walks_the_same_stochastic_walk(betas, steps):
    reference, levels = theirs(
        "DPMSolverMultistepScheduler", betas, steps, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    ours, others = Noise(3, range(16), (2,)), Noise(3, range(16), (2,))
    x = levels[0].sigma * normals(16, 2).float()
    path = walk(published("dpmpp_2m_sde", steps), triangle(), levels, x, ours)
    assert apart(path, their_path(reference, levels, x, others)) <= 1e-5


def test_diffusers_has_a_wrong_sign_in_its_third_order_stochastic_step():
    """D2's weight there is (1 - e^-H - H)/H^2 - 1/2, about -1, where H = 2h. With + 1/2 it is H phi_3(-H), about H/6,
    as in k-diffusion."""
    for h in (0.01, 0.3, 2.0):
        big = 2 * h
        written = (1 - math.exp(-big) - big) / big**2
        assert big * phi(3, -big) == pytest.approx(written + 0.5, rel=1e-8)
        assert written - 0.5 < -0.5
    reference, levels = theirs(
        "DPMSolverMultistepScheduler", "linear", 20, algorithm_type="sde-dpmsolver++", solver_order=3
    )
    found, x = published("dpmpp_3m_sde", 20), normals(16, 2)
    reference._step_index, m, z = 5, [normals(16, 2, seed=i) for i in (1, 2, 3)], normals(16, 2, seed=4)
    wrong = reference.multistep_dpm_solver_third_order_update(m[::-1], sample=x, noise=z)
    told = iter(m[::-1])
    going = Walk(lambda *_: next(told), Linear(), lambda: z)
    *_, ours = (found.step(going, x, levels[i], levels[i + 1]) for i in (3, 4, 5))
    lam = [level.half_log_snr for level in levels[3:7]]
    h, r_0, r_1 = lam[3] - lam[2], (lam[2] - lam[1]) / (lam[3] - lam[2]), (lam[1] - lam[0]) / (lam[3] - lam[2])
    d2 = ((m[0] - m[1]) / r_0 - (m[1] - m[2]) / r_1) / (r_0 + r_1)
    assert (ours - (wrong + levels[6].alpha * d2)).abs().max() <= 1e-9


def width_error(found: Sampler, schedule) -> float:
    """By how much the variance at the last noisy level is off for Gaussian data, relatively and without sampling."""
    data = White(0.0, 0.5)
    *_, state, _ = found.walk(data, schedule, Impulses(2 * found.steps + 2))
    right = (state.level.alpha * data.std) ** 2 + state.level.sigma**2
    return abs(state.x_t.square().sum().item() / right - 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", SDE)
def test_the_variance_is_right_to_second_order(name, eta, schedule):
    """Where DDPM's is to first."""
    levels = schedule_of(schedule)
    found = [width_error(published(name, steps, eta=eta), levels) for steps in (64, 128, 256)]
    assert min(slopes(found)) > 1.7
    ddpm = [width_error(published("ddpm", steps), levels) for steps in (64, 128, 256)]
    assert max(slopes(ddpm)) < 1.2
    assert found[-1] < ddpm[-1] / 5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SDE)
def test_noise_leaves_the_mean_and_the_variance_of_gaussian_data(name, schedule):
    """Within four standard errors of 20,000 samples, without their scatter."""
    data, found = White(0.3, 0.5), published(name, 150)
    mean, std = moments(found(data, schedule_of(schedule), Impulses(2 * found.steps + 2)))
    assert abs(mean - data.mean) < 4 * data.std / math.sqrt(20_000)
    assert abs((std / data.std) ** 2 - 1) < 4 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize(("name", "same"), [("dpmpp_2m_sde", "dpmpp_2m"), ("dpmpp_sde", "dpmpp_2s")])
def test_without_noise_they_are_the_deterministic_ones(name, same):
    levels, x = Linear(), normals(16, 2)
    found, expected = published(name, 20, eta=0.0)(triangle(), levels, x), published(same, 20)(triangle(), levels, x)
    assert (found - expected).abs().max() < 1e-12


def k_diffusion_2s(x: Tensor, sigma_t: float, sigma_s: float, eta: float, denoise, noise: list[Tensor]) -> Tensor:
    """sample_dpmpp_sde's step in alpha = 1, written from its formulas."""

    def split(start: float, end: float) -> tuple[float, float]:
        up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
        return math.sqrt(end**2 - up**2), up

    middle = math.sqrt(sigma_t * sigma_s)
    x_0 = denoise(x, Rung(1.0, sigma_t))
    down, up = split(sigma_t, middle)
    x_m = down / sigma_t * x + (1 - down / sigma_t) * x_0 + up * noise[0]
    down, up = split(sigma_t, sigma_s)
    return down / sigma_t * x + (1 - down / sigma_t) * denoise(x_m, Rung(1.0, middle)) + up * noise[1]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_k_diffusions_singlestep_sde_is_the_same_but_for_the_path_of_its_noise(eta):
    """Given the whole step's normal. There it shares with the middle's what Brownian motion in sigma does; here what
    the SDE does; were it drawn anew, the variance would be of first order."""
    x, z = 5 * normals(16, 2), [normals(16, 2, seed=1), normals(16, 2, seed=2)]
    t, s = Rung(1.0, 6.0), Rung(1.0, 2.0)
    found = published("dpmpp_sde", 2, eta=eta)
    going = Walk(triangle(), Scaled(Linear()), iter(z).__next__)
    ours = found.step(going, x, t, s)

    r = math.sqrt(2 / 6)  # the ratio of sigmas over half a step, which exact Ito integrals give
    share = math.sqrt((1 - eta**2 * (1 - r**2)) * (1 - r**2) / (1 - r**4))
    shared = share * z[0] + math.sqrt(1 - share**2) * z[1]
    assert (ours - k_diffusion_2s(x, 6.0, 2.0, eta, going.denoise, [z[0], shared])).abs().max() < 1e-9


def test_noise_drawn_anew_for_the_whole_step_would_cost_an_order():
    data, levels, errors = White(0.0, 0.5), Scaled(Linear()), []
    for steps in (64, 128, 256):
        rungs = published("ddim", steps).levels(levels)[:-1]
        source = Impulses(2 * steps + 2)
        x = rungs[0].sigma * source()
        for t, s in itertools.pairwise(rungs):
            x = k_diffusion_2s(x, t.sigma, s.sigma, 1.0, Walk(data, levels).denoise, [source(), source()])
        errors.append(abs(x.square().sum().item() / (data.std**2 + rungs[-1].sigma ** 2) - 1))
    assert max(slopes(errors)) < 1.3
    assert width_error(published("dpmpp_sde", 256), levels) < errors[-1] / 10


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 2.0])
def test_k_diffusions_third_order_sde_takes_the_same_steps(eta):
    """sample_dpmpp_3m_sde, in alpha = 1, written from its formulas."""
    sigmas, x, denoise = [20.0, 9.0, 5.0, 2.5, 1.5, 0.6, 0.1], 20 * normals(16, 2), Walk(triangle(), Linear()).denoise
    rungs = [*(Rung(1.0, sigma) for sigma in sigmas), CLEAN]
    ours = walk(published("dpmpp_3m_sde", 7, eta=eta), triangle(), rungs, x, Noise(1, range(16), (2,), dtype=x.dtype))
    noise, past, path = Noise(1, range(16), (2,), dtype=x.dtype), [], [x]
    for sigma_t, sigma_s in itertools.pairwise(sigmas):
        past.insert(0, denoise(x, Rung(1.0, sigma_t)))
        h = math.log(sigma_t / sigma_s)
        big = (1 + eta) * h
        x = math.exp(-big) * x + (1 - math.exp(-big)) * past[0]
        phi_2 = (math.exp(-big) - 1) / big + 1
        phi_3 = phi_2 / big - 0.5
        i = len(past)
        before = [math.log(sigmas[i - k - 2] / sigmas[i - k - 1]) / h for k in range(min(2, i - 1))]
        slope = [(past[k] - past[k + 1]) / r for k, r in enumerate(before)]
        if len(slope) == 1:
            x = x + phi_2 * slope[0]
        elif slope:
            curve = (slope[0] - slope[1]) / sum(before)
            x = x + phi_2 * (slope[0] + (slope[0] - slope[1]) * before[0] / sum(before)) - phi_3 * curve
        x = x + sigma_s * math.sqrt(1 - math.exp(-2 * eta * h)) * (noise() if eta else 0)
        path.append(x)
    assert apart(ours[:-1], path) < 1e-9
