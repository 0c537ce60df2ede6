"""Solvers of the probability-flow ODE: their published algorithms written out, and diffusers' schedulers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.rng import Noise
from denoiselab.sampler import AB4, PNDM, RK45, EDMStochastic, FlowHeun, Heun, LearnedDDPM, Walk
from denoiselab.schedule import Cosine, Linear, Schedule
from exact import White, every, make, normals, relative, rms, triangle
from walks import Straight, eps_of, flows, schedule_of, spacing_of

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class Given:
    """A spacing with the levels sigma/alpha of another program."""

    def __init__(self, ratios):
        self.log_snr = -2 * torch.as_tensor(ratios, dtype=torch.float64).log()

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        return schedule.inverse(self.log_snr)


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
    levels, exact, x = schedule_of(schedule), triangle(), normals(8, 2)
    found = make("sampler", "heun", spacing=spacing_of("karras"), steps=steps)
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
    levels, exact = schedule_of(schedule), triangle()
    found = make("sampler", "edm_stochastic", spacing=spacing_of("karras"), steps=18, **churn)
    sigmas = [rung.ratio for rung in found.levels(levels)[:-1]]
    noise = Noise(0, range(8), (2,), dtype=torch.float64)
    expected = edm_sampler(exact, sigmas[0] * noise(), sigmas, noise, **churn)
    assert (found(exact, levels, Noise(0, range(8), (2,), dtype=torch.float64)) - expected).abs().max() < 1e-10


@every("spacing", "schedule")
def test_without_churn_the_stochastic_sampler_is_heun(spacing, schedule):
    levels, x = schedule_of(schedule), normals(8, 2)
    still = make("sampler", "edm_stochastic", spacing=spacing_of(spacing), steps=7, s_churn=0.0)
    heun = make("sampler", "heun", spacing=spacing_of(spacing), steps=7)
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
    found = make("sampler", "heun", spacing=spacing_of(kind), steps=steps)
    assert (found(exact, schedule_of("linear"), x) - y).abs().max() <= 1e-5


@every("schedule")
def test_flow_heun_is_heuns_method_in_flow_time(schedule):
    levels, exact, x = schedule_of(schedule), triangle(), normals(8, 2)
    found = make("sampler", "flow_heun", spacing=spacing_of("trailing"), steps=9)
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
    exact, schedule = triangle(), schedule_of("linear")
    found = make("sampler", "pndm", spacing=spacing_of("leading"), steps=steps)
    x = found.levels(schedule)[0].sigma * normals(8, 2).float()
    *_, last, sample = found.walk(exact, schedule, normals(8, 2).float())
    theirs, calls = diffusers_pndm(steps, x, exact, "leading", True)
    assert found.nfe == sample.calls == calls == steps + 9
    assert (sample.x_t - theirs).abs().max() <= 1e-5
    theirs, _ = diffusers_pndm(steps, x, exact, "leading", False)
    assert (last.x_t - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_short_walks_of_pndm_count_their_calls(steps):
    found = make("sampler", "pndm", spacing=spacing_of("trailing"), steps=steps)
    for schedule in (Linear(), Straight()):
        *_, sample = found.walk(White(), schedule, normals(8, 1))
        assert sample.calls == found.nfe == steps + 3 * min(3, steps - 1)
        assert sample.x_t.isfinite().all()


@pytest.mark.parametrize("sampler", ["pndm", "flow_heun", "ab4", "rk45"])
@pytest.mark.parametrize("spacing", ["log_snr", "trailing"])
@pytest.mark.parametrize("schedule", [Straight(), Cosine()], ids=["straight", "cosine"])
def test_float32_loses_little_from_pure_noise_on(schedule, spacing, sampler):
    found, x = make("sampler", sampler, spacing=spacing_of(spacing), steps=40), normals(32, 2)
    error = found(triangle(), schedule, x.float()) - found(triangle(), schedule, x.float().double())
    assert error.abs().max() < {"pndm": 2e-4, "rk45": 1e-4}.get(sampler, 1e-5)  # rk45's steps have tolerances of 1e-5


# Fourth order


@pytest.mark.parametrize("spacing", ["log_snr", "karras", "trailing"])
def test_ab4_integrates_a_cubic_exactly(spacing):
    """x_0_hat = 1 - r + r^2 - 2 r^3 whatever x_t: x/sigma gains its integral over alpha/sigma."""
    found, levels = make("sampler", "ab4", spacing=spacing_of(spacing), steps=20), Linear()
    rungs = found.levels(levels)[:-1]

    def cubic(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r = sigma / alpha
        return 1 - r + r**2 - 2 * r**3 + 0 * x

    def integral(r: float) -> float:  # of the cubic over 1/r
        return 1 / r + math.log(r) - r + r**2

    walk = Walk(cubic, levels)
    for i, (t, s) in enumerate(itertools.pairwise(rungs)):
        x_s = found.step(walk, torch.zeros(1, 1).double(), t, s)
        if i >= 3:
            expected = s.sigma * (integral(s.ratio) - integral(t.ratio))
            assert x_s.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# Adaptive steps


@every("schedule")
def test_rk45_is_as_accurate_as_its_tolerances(schedule):
    levels, x = schedule_of(schedule), normals(16, 2)
    spacing, calls = spacing_of("log_snr"), []
    for tolerance in (1e-3, 1e-5, 1e-7):
        found = make("sampler", "rk45", spacing=spacing, steps=2, rtol=tolerance, atol=tolerance)
        *_, state, sample = found.walk(triangle(), levels, x)
        assert rms(state.x_t - flows()[schedule, "log_snr"]) < 10 * tolerance
        assert found.nfe is None
        calls.append(sample.calls)
    assert calls == sorted(calls)
    assert calls[-1] < 250


def test_rk45_stops_at_the_levels_of_its_spacing():
    found, levels, exact, x = make("sampler", "rk45", steps=6), Cosine(), White(0.3, 0.5), normals(16, 1)
    first = found.levels(levels)[0]
    for state in list(found.walk(exact, levels, x))[1:-1]:
        assert (state.x_t - exact.flow(first.sigma * x, first, state.level)).abs().max() < 1e-4


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
        kind(spacing_of("trailing"), **arguments)
