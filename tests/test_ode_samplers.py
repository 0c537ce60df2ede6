"""Solvers of the probability-flow ODE: their published algorithms written out, diffusers' schedulers, and inversion."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.rng import Noise
from denoiselab.sampler import AB4, DDIM, PNDM, RK45, EDMStochastic, FlowHeun, Heun, LearnedDDPM, Rung, invert
from denoiselab.sampler.base import Denoise
from denoiselab.schedule import Cosine, Discrete, Linear, Schedule
from exact import Scaled, White, every, make, normals, relative, rms, solve, triangle

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class Straight(Schedule):
    """The straight path, from t = first (1 is pure noise) to the data."""

    def __init__(self, first: float = 1.0):
        super().__init__()
        self.first = first

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - self.first * t, self.first * t


class Given:
    """A spacing with the levels sigma/alpha of another program."""

    def __init__(self, ratios):
        self.log_snr = -2 * torch.as_tensor(ratios, dtype=torch.float64).log()

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        return schedule.inverse(self.log_snr)


class VE(Schedule):
    """alpha = 1 and sigma from 1e-3 to 1e3: EDM's own coordinates."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), 10 ** (6 * t - 3)


def eps_of(exact, x: Tensor, alpha: float, sigma: float) -> Tensor:
    level = (torch.full((len(x), 1), value, dtype=x.dtype) for value in (alpha, sigma))
    return (x - alpha * exact(x, *level)) / sigma


# Euler is DDIM


@every("spacing", "schedule")
def test_ddim_is_eulers_method_in_sigma_over_alpha_and_in_flow_time(spacing, schedule):
    levels, exact, x = make("schedule", schedule), triangle(), normals(8, 2)
    found = make("sampler", "euler", spacing=make("spacing", spacing), steps=9)
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
    found = make("sampler", "euler", spacing=make("spacing", kind), steps=steps)
    assert (found(exact, make("schedule", "linear"), x) - y).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [4, 10, 25, 50])
@pytest.mark.parametrize("sampler", ["euler", "flow_heun"])
def test_diffusers_walks_the_same_walk_of_straight_paths(steps, sampler):
    """Theirs starts from t = 1 and, with Heun, asks at t = 0.001 last."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    kind = FlowMatchEulerDiscreteScheduler if sampler == "euler" else FlowMatchHeunDiscreteScheduler
    reference = kind()
    reference.set_timesteps(steps)
    exact, x = triangle(), normals(8, 2).float()
    z = x
    for t in reference.timesteps:
        tau = t.item() / 1000
        level = (torch.full((8, 1), value) for value in (max(1 - tau, 1e-6 * tau), tau))
        z = reference.step((z - exact(z, *level)) / tau, t, z).prev_sample
    taus = (reference.timesteps / 1000).double().unique().flip(0)
    found = make("sampler", sampler, spacing=Given(taus / (1 - taus)), steps=steps)
    assert found.nfe == len(reference.timesteps)
    assert relative(found(exact, Straight(), x), z) <= 1e-5


# Heun's method, and EDM's


def edm_sampler(exact, x, sigmas, noise=None, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """Algorithm 2 of arXiv:2206.00364 with sigma(t) = t and s(t) = 1; without churn, algorithm 1."""
    n = len(sigmas)
    for t, after in itertools.pairwise([*sigmas, 0.0]):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * noise()
        d = eps_of(exact, x, 1.0, t_hat)
        euler = x + (after - t_hat) * d
        x = euler if after == 0 else x + (after - t_hat) * (d + eps_of(exact, euler, 1.0, after)) / 2
    return x


@pytest.mark.parametrize("steps", [2, 5, 18])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "ve"])
def test_heun_is_edms_deterministic_sampler(schedule, steps):
    levels, exact, x = make("schedule", schedule), triangle(), normals(8, 2)
    found = make("sampler", "heun", spacing=make("spacing", "karras"), steps=steps)
    sigmas = [rung.ratio for rung in found.levels(levels)[:-1]]
    assert (found(exact, levels, x) - edm_sampler(exact, sigmas[0] * x, sigmas)).abs().max() < 1e-10


@pytest.mark.parametrize("schedule", ["linear", "cosine", "ve"])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
        {"s_churn": 3.0, "s_min": 0.0, "s_max": 1e9, "s_noise": 1.0},
        {"s_churn": 5.0, "s_min": 0.3, "s_max": 2.0, "s_noise": 0.9},
    ],
)
def test_the_stochastic_sampler_is_edms(schedule, churn):
    levels, exact = make("schedule", schedule), triangle()
    found = make("sampler", "edm_stochastic", spacing=make("spacing", "karras"), steps=18, **churn)
    sigmas = [rung.ratio for rung in found.levels(levels)[:-1]]
    noise = Noise(0, range(8), (2,), dtype=torch.float64)
    expected = edm_sampler(exact, sigmas[0] * noise(), sigmas, noise, **churn)
    assert (found(exact, levels, Noise(0, range(8), (2,), dtype=torch.float64)) - expected).abs().max() < 1e-10


@every("spacing", "schedule")
def test_without_churn_the_stochastic_sampler_is_heun(spacing, schedule):
    levels, x = make("schedule", schedule), normals(8, 2)
    still = make("sampler", "edm_stochastic", spacing=make("spacing", spacing), steps=7, s_churn=0.0)
    heun = make("sampler", "heun", spacing=make("spacing", spacing), steps=7)
    assert torch.equal(still(triangle(), levels, x), heun(triangle(), levels, x))


@pytest.mark.parametrize("steps", [4, 10, 25, 50])
@pytest.mark.parametrize("kind", ["leading", "trailing"])
def test_diffusers_walks_the_same_heun_walk(steps, kind):
    from diffusers import HeunDiscreteScheduler

    reference = HeunDiscreteScheduler(**LINEAR, timestep_spacing=kind)
    reference.set_timesteps(steps)
    exact, x = triangle(), normals(8, 2).float()
    y, sigmas = x * reference.sigmas[0], reference.sigmas.tolist()
    for i, t in enumerate(reference.timesteps):
        y = reference.step(eps_of(exact, y, 1.0, sigmas[i]), t, y).prev_sample
    found = make("sampler", "heun", spacing=make("spacing", kind), steps=steps)
    assert (found(exact, make("schedule", "linear"), x) - y).abs().max() <= 1e-5


@every("schedule")
def test_flow_heun_is_heuns_method_in_flow_time(schedule):
    levels, exact, x = make("schedule", schedule), triangle(), normals(8, 2)
    found = make("sampler", "flow_heun", spacing=make("spacing", "trailing"), steps=9)
    tau = [rung.sigma / (rung.alpha + rung.sigma) for rung in found.levels(levels)[:-1]]

    def slope(z: Tensor, t: float) -> Tensor:
        eps = eps_of(exact, z, 1 - t, t)
        return eps - (z - t * eps) / (1 - t)

    z = x * tau[0]
    for t, s in itertools.pairwise(tau):
        first = slope(z, t)
        z = z + (s - t) * (first + slope(z + (s - t) * first, s)) / 2
    z = z - tau[-1] * slope(z, tau[-1])
    assert (found(exact, levels, x) - z).abs().max() < 1e-12 + 1e-15 / (1 - tau[0])


# Learned variance


class Sure:
    """A denoiser whose answer and variance are given."""

    has_variance = True

    def __init__(self, x_0: Tensor, variance: Tensor):
        self.found = Outputs(x_0, variance)

    def outputs(self, *arguments, **cond) -> Outputs:
        return self.found


@pytest.mark.parametrize("betas", [LINEAR, {"beta_schedule": "squaredcos_cap_v2"}], ids=["linear", "cosine"])
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
        denoise = Denoise(Sure(x_0_hat, v))
        t, s = levels[999 - index], levels[1000 - index]
        ours = found.step(denoise, x_t, t, s, schedule, lambda: normals(4, 3, 2, 2, seed=7), {})
        assert (ours - theirs).abs().max() <= 1e-9, index


def test_the_bounds_of_the_learned_variance_are_ddpms():
    levels, spacing, shape = Cosine(), make("spacing", "trailing"), (16, 2)
    for v, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):
        exact = triangle()
        ddpm = make("sampler", "ddpm", spacing=spacing, steps=20, variance=variance)
        expected = ddpm(exact, levels, Noise(0, range(16), (2,), dtype=torch.float64))

        class Bound:
            def outputs(self, *arguments, v=v, exact=exact):
                x_0 = exact(*arguments)
                return Outputs(x_0, torch.full(shape, v, dtype=torch.float64))

        found = make("sampler", "ddpm_learned", spacing=spacing, steps=20)
        sample = found(Bound(), levels, Noise(0, range(16), (2,), dtype=torch.float64))
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-12)


def test_a_denoiser_without_a_variance_is_refused_in_a_line():
    found = make("sampler", "ddpm_learned")
    for refused in (lambda: found.check(White()), lambda: found(White(), Cosine(), normals(2, 1))):
        with pytest.raises(ValueError, match=r"^LearnedDDPM needs a variance, [^\n]*loss=learned_hybrid[^\n]*$"):
            refused()
    found.check(Sure(normals(1), normals(1)))


# PNDM


def diffusers_pndm(steps: int, x: Tensor, exact, kind: str, to_one: bool) -> tuple[Tensor, int]:
    from diffusers import PNDMScheduler

    reference = PNDMScheduler(**LINEAR, timestep_spacing=kind, set_alpha_to_one=to_one)
    reference.set_timesteps(steps)
    for t in reference.timesteps.tolist():
        abar = reference.alphas_cumprod[t].item()
        x = reference.step(eps_of(exact, x, math.sqrt(abar), math.sqrt(1 - abar)), t, x).prev_sample
    return x, len(reference.timesteps)


@pytest.mark.parametrize("steps", [4, 10, 20, 50, 100])
def test_diffusers_walks_the_same_pndm_walk(steps):
    """Where T/N is even, so that the middle of a step is a point of the table. Their default leaves the last step out:
    alpha stays that of the first point."""
    exact, schedule = triangle(), make("schedule", "linear")
    found = make("sampler", "pndm", spacing=make("spacing", "leading"), steps=steps)
    x = found.levels(schedule)[0].sigma * normals(8, 2).float()
    *_, last, sample = found.walk(exact, schedule, normals(8, 2).float())
    theirs, calls = diffusers_pndm(steps, x, exact, "leading", True)
    assert found.nfe == sample.calls == calls == steps + 9
    assert (sample.x_t - theirs).abs().max() <= 1e-5
    theirs, _ = diffusers_pndm(steps, x, exact, "leading", False)
    assert (last.x_t - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_short_walks_of_pndm_count_their_calls(steps):
    found = make("sampler", "pndm", spacing=make("spacing", "trailing"), steps=steps)
    for schedule in (Linear(), Straight()):
        *_, sample = found.walk(White(), schedule, normals(8, 1))
        assert sample.calls == found.nfe == steps + 3 * min(3, steps - 1)
        assert sample.x_t.isfinite().all()


@pytest.mark.parametrize("sampler", ["pndm", "flow_heun", "ab4", "rk45"])
@pytest.mark.parametrize("spacing", ["log_snr", "trailing"])
@pytest.mark.parametrize("schedule", [Straight(), Cosine()], ids=["straight", "cosine"])
def test_float32_loses_little_from_pure_noise_on(schedule, spacing, sampler):
    found, x = make("sampler", sampler, spacing=make("spacing", spacing), steps=40), normals(32, 2)
    error = found(triangle(), schedule, x.float()) - found(triangle(), schedule, x.float().double())
    assert error.abs().max() < {"pndm": 2e-4, "rk45": 1e-4}.get(sampler, 1e-5)  # rk45's steps have tolerances of 1e-5


# Fourth order


@pytest.mark.parametrize("spacing", ["log_snr", "karras", "trailing"])
def test_ab4_integrates_a_cubic_exactly(spacing):
    """x_0_hat = 1 - r + r^2 - 2 r^3 whatever x_t: x/sigma gains its integral over alpha/sigma."""
    found, levels = make("sampler", "ab4", spacing=make("spacing", spacing), steps=20), Linear()
    rungs, memory = found.levels(levels)[:-1], {}

    def cubic(x: Tensor, rung: Rung) -> Tensor:
        r = rung.ratio
        return torch.full_like(x, 1 - r + r**2 - 2 * r**3)

    def integral(r: float) -> float:  # of the cubic over 1/r
        return 1 / r + math.log(r) - r + r**2

    for i, (t, s) in enumerate(itertools.pairwise(rungs)):
        x_s = found.step(cubic, torch.zeros(1, 1).double(), t, s, levels, None, memory)
        if i >= 3:
            expected = s.sigma * (integral(s.ratio) - integral(t.ratio))
            assert x_s.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# Adaptive steps


@every("schedule")
def test_rk45_is_as_accurate_as_its_tolerances(schedule):
    levels, x = make("schedule", schedule), normals(16, 2)
    spacing, calls = make("spacing", "log_snr"), []
    for tolerance in (1e-3, 1e-5, 1e-7):
        found = make("sampler", "rk45", spacing=spacing, steps=2, rtol=tolerance, atol=tolerance)
        first, last, _ = found.levels(levels)
        *_, state, sample = found.walk(triangle(), levels, x)
        assert rms(state.x_t - solve(triangle(), first.sigma * x, first, last, 1000)) < 10 * tolerance
        assert found.nfe is None
        calls.append(sample.calls)
    assert calls == sorted(calls)
    assert calls[-1] < 250


def test_rk45_stops_at_the_levels_of_its_spacing():
    found, levels, exact, x = make("sampler", "rk45", steps=6), Cosine(), White(0.3, 0.5), normals(16, 1)
    first = found.levels(levels)[0]
    for state in list(found.walk(exact, levels, x))[1:-1]:
        assert (state.x_t - exact.flow(first.sigma * x, first, state.level)).abs().max() < 1e-4


# Inversion


@pytest.mark.parametrize("spacing", ["trailing", "log_snr", "karras"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "ve"])
@pytest.mark.parametrize("exact", [White(0.3, 0.5), triangle()], ids=["gaussian", "mixture"])
def test_encoding_and_decoding_lose_less_with_more_steps(exact, schedule, spacing):
    levels, errors = make("schedule", schedule), []
    x_0 = 0.3 + 0.5 * normals(32, 1) if isinstance(exact, White) else exact.draw(32)[0]
    for steps in (32, 64, 128, 256):
        found = DDIM(make("spacing", spacing), steps)
        errors.append(rms(found(exact, levels, invert(found, exact, levels, x_0)) - x_0))
    slopes = [math.log2(before / after) for before, after in itertools.pairwise(errors)]
    assert slopes[-1] > 0.85
    assert errors[-1] < 0.02


@pytest.mark.parametrize("schedule", ["linear", "cosine", "ve", "flow"])
def test_the_noise_of_gaussian_data_is_the_flows(schedule):
    """In closed form: standardised values stay. And at any scale of the levels."""
    exact, levels, x_0 = White(0.3, 0.5), make("schedule", schedule), 0.3 + 0.5 * normals(64, 1)
    found = DDIM(make("spacing", "log_snr"), 1000)
    noise = invert(found, exact, levels, x_0)
    first = found.levels(levels)[0]
    expected = exact.flow(x_0, Rung(1.0, 0.0), first) / first.sigma
    assert rms(noise - expected) < 0.01
    torch.testing.assert_close(invert(found, exact, Scaled(levels, 80.0), x_0), noise, rtol=0, atol=1e-8)


def test_inversion_calls_the_network_once_a_level_with_the_condition():
    calls = []

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor) -> Tensor:
        calls.append((alpha_t[0].item(), sigma_t[0].item()))
        return 5 * x_t

    found = DDIM(make("spacing", "trailing"), 7, clip=1.0)
    noise = invert(found, denoiser, Cosine(), torch.ones(2, 1, 4, 4).double(), label=torch.zeros(2))
    noisy = [tuple(rung) for rung in reversed(found.levels(Cosine())[:-1])]
    assert calls == [noisy[0], *noisy[:-1]]
    assert noise.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("steps", [10, 50])
def test_diffusers_takes_the_same_steps_towards_noise(steps):
    """Told what the network says at the level that the step starts from. Their pipelines ask at the level that it
    goes to, about x_t of the one before, and their walks stop at T - T/N, not at T."""
    from diffusers import DDIMInverseScheduler

    reference = DDIMInverseScheduler(**LINEAR, prediction_type="sample", clip_sample=False)
    reference.set_timesteps(steps)
    betas = reference.betas.double()
    reference.alphas_cumprod = (1 - betas).cumprod(0)
    schedule, exact, found = Discrete(betas), triangle(), DDIM(make("spacing", "leading"), steps)
    x_0, stride = exact.draw(8)[0], 1000 // steps
    first = schedule(torch.zeros(8, 1).double())
    x = first.alpha * x_0 + first.alpha * (x_0 - exact(first.alpha * x_0, *first))  # the step from clean data
    for index in reference.timesteps.tolist()[1:]:
        x_0_hat = exact(x, *schedule(torch.full((8, 1), (index - stride) / 999).double()))
        x = reference.step(x_0_hat, index, x).prev_sample
    last = found.levels(schedule)[0]
    assert (invert(found, exact, schedule, x_0) - x / last.sigma).abs().max() < 1e-8


# Refusals


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        *((EDMStochastic, {"s_churn": value}, f"s_churn={value}: need") for value in (-1.0, math.nan)),
        *((EDMStochastic, {"s_min": value}, f"s_min={value}: need") for value in (-1.0, math.nan)),
        *((EDMStochastic, {"s_max": value}, f"s_max={value}: need") for value in (0.01, math.nan)),
        *((EDMStochastic, {"s_noise": value}, f"s_noise={value}: need") for value in (0.0, math.nan)),
        *((RK45, {key: value}, f"{key}={value}: need") for key in ("rtol", "atol") for value in (0.0, math.nan)),
        *((kind, {"steps": 0}, "steps=0: need") for kind in (AB4, PNDM, FlowHeun, Heun, LearnedDDPM, RK45)),
    ],
)
def test_bad_arguments_are_refused_in_a_line(kind, arguments, named):
    with pytest.raises(ValueError, match=rf"^{named}[^\n]*$"):
        kind(make("spacing", "trailing"), **arguments)
