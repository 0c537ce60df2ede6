import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.errors import UserError
from denoiselab.rng import Noise
from denoiselab.sampler import DDIM, Leading, Linspace, LogSNR, Rung, Sampler, Trailing
from denoiselab.schedule import RATIO, Cosine, Discrete, Linear, Schedule
from exact import (
    OPTIONS,
    Mixture,
    Scaled,
    White,
    every,
    make,
    normals,
    parts,
    relative,
    rms,
    solve,
    triangle,
)

THEIRS = pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=["linear", "cosine"],
)
GRIDS = [(Trailing, "trailing"), (Leading, "leading"), (Linspace, "linspace")]


class Counting:
    """A source of noise, or a denoiser, that counts its calls."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, *arguments, **cond):
        self.calls += 1
        return self.inner(*arguments, **cond)


def option(name: str, spacing: str = "log_snr", steps: int = 10, **arguments) -> Sampler:
    """An option without clipping, along a spacing of choice."""
    arguments.setdefault("clip", None)
    return make("sampler", name, spacing=make("spacing", spacing), steps=steps, **arguments)


def addressed(n: int, *shape: int, seed: int = 0) -> Noise:
    return Noise(seed, range(n), shape, dtype=torch.float64)


def is_stochastic(name: str) -> bool:
    source = Counting(addressed(1, 1))
    option(name, steps=3)(White(), Cosine(), source)
    return source.calls > 1


DETERMINISTIC = [name for name in OPTIONS["sampler"] if not is_stochastic(name)]


def untold(schedule: Schedule, spacing: str, steps: int) -> list[Rung]:
    return DDIM(make("spacing", spacing), steps).levels(schedule)


class Even(Schedule):
    """A schedule without points: log-SNR from 10 to -10, straight."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value = 10 - 20 * t
        return value.sigmoid().sqrt(), (-value).sigmoid().sqrt()


class Power(Schedule):
    """A schedule without points that reaches the data itself, and noise but for a share."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t = 1 - (1 - self.share) * t**3
        return alpha_t, (1 - alpha_t**2).sqrt()


@every("spacing", "schedule")
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 13, 50, 999, 1000])
def test_levels_fall_strictly_to_the_data(spacing, schedule, steps):
    found = make("schedule", schedule)
    times = make("spacing", spacing)(found, steps)
    levels = untold(found, spacing, steps)
    assert times.shape == (steps,)
    assert times.dtype == torch.float64
    assert ((times >= 0) & (times <= 1)).all()
    assert len(levels) == steps + 1
    assert levels[-1] == (1.0, 0.0)
    assert all(isinstance(value, float) for level in levels for value in level)
    assert all(t.ratio > s.ratio for t, s in itertools.pairwise(levels))
    told = torch.tensor(levels[:-1], dtype=torch.float64).T
    torch.testing.assert_close(told, torch.stack(found(times)), rtol=0, atol=1e-6)  # alpha is held at sigma/1e6


@every("schedule")
@pytest.mark.parametrize("steps", [1, 2, 13, 50])
def test_trailing_linspace_and_log_snr_start_at_pure_noise(schedule, steps):
    found = make("schedule", schedule)
    for spacing in ("trailing", "linspace", "log_snr"):
        assert make("spacing", spacing)(found, steps)[0] == 1


@every("schedule")
@pytest.mark.parametrize("steps", [2, 13, 50])
def test_all_but_trailing_end_at_the_cleanest_level(schedule, steps):
    found = make("schedule", schedule)
    for spacing in set(OPTIONS["spacing"]) & {"leading", "linspace", "log_snr", "karras"}:
        assert make("spacing", spacing)(found, steps)[-1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("spacing", "name"), GRIDS)
@pytest.mark.parametrize("steps", [2, 4, 5, 10, 13, 16, 50, 300, 999, 1000])
def test_diffusers_visits_the_same_points(spacing, name, steps):
    """Points are counted from 0 there. 16 trailing steps fall on halves, which are rounded to the even point of
    1..T (Lin et al. 2023, table 2)."""
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(timestep_spacing=name, steps_offset=0)
    reference.set_timesteps(steps)
    index = spacing()(Linear(), steps) * 999
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    assert index.round().long().tolist() == reference.timesteps.tolist()


@every("schedule")
@pytest.mark.parametrize("steps", [3, 20])
def test_log_snr_spacing_is_even_in_log_snr(schedule, steps):
    found = make("schedule", schedule)
    log_snr = found.log_snr(LogSNR()(found, steps))
    torch.testing.assert_close(log_snr, torch.linspace(log_snr[0], log_snr[-1], steps).double(), rtol=1e-6, atol=1e-6)
    assert log_snr[-1].item() == pytest.approx(found.log_snr(torch.zeros(()).double()).item(), abs=1e-9)


@every("schedule")
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_spacing_is_even_in_a_root_of_sigma(schedule, rho):
    """And bounded by sigma_max where the schedule goes beyond it."""
    found = make("schedule", schedule)
    for sigma_max in (2.0, 80.0, 1e9):
        times = make("spacing", "karras", rho=rho, sigma_max=sigma_max)(found, 18)
        root = (found.log_snr(times) / -2).exp() ** (1 / rho)
        first = min(sigma_max, (found.log_snr(torch.ones(()).double()) / -2).exp().item())
        assert root[0].item() ** rho == pytest.approx(first, rel=1e-9)
        torch.testing.assert_close(root.diff(), root.diff()[:1].expand(17), rtol=1e-6, atol=0)


@every("spacing")
@pytest.mark.parametrize("steps", [1, 2, 13, 1500])
def test_levels_fall_strictly_on_a_continuous_schedule(spacing, steps):
    levels = untold(Even(), spacing, steps)
    assert len(levels) == steps + 1
    assert all(t.ratio > s.ratio for t, s in itertools.pairwise(levels))


# What a walk is


@every("sampler", "spacing", "schedule")
def test_a_walk_visits_its_levels_and_counts_its_calls(sampler, spacing, schedule):
    found, levels = option(sampler, spacing, 7), make("schedule", schedule)
    denoiser, x = Counting(triangle()), normals(4, 2)
    states = list(found.walk(denoiser, levels, x))
    expected = found.levels(levels)
    assert [state.level for state in states] == expected
    assert denoiser.calls == states[-1].calls == found.nfe
    assert states[0].x_0_hat is None
    assert states[0].calls == 0
    assert torch.equal(states[0].x_t, expected[0].sigma * x)
    assert all(state.x_t.shape == state.x_0_hat.shape == x.shape for state in states[1:])
    if sampler in DETERMINISTIC:
        assert torch.equal(found(triangle(), levels, x), states[-1].x_t)


@every("sampler")
def test_the_denoiser_gets_the_condition_and_levels_per_sample(sampler):
    label = torch.arange(4)

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        assert alpha_t.shape == sigma_t.shape == (4, 1, 1, 1)
        assert alpha_t.dtype == sigma_t.dtype == x_t.dtype == torch.float32
        assert cond == {"label": label}
        return 0.5 * x_t.requires_grad_()

    x_0 = option(sampler, steps=3)(denoiser, Cosine(), torch.zeros(4, 1, 8, 8), label=label)
    assert x_0.dtype == torch.float32
    assert not x_0.requires_grad


@every("sampler", "spacing")
@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_clip_bounds_the_estimate(sampler, spacing, clip):
    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return 5 * x_t + 0.1

    _, *states = option(sampler, spacing, 5, clip=clip).walk(denoiser, Linear(), normals(64, 2))
    for state in states:
        assert state.x_0_hat.abs().max() <= clip
    assert states[-1].x_t.abs().max() <= clip
    assert (states[-1].x_0_hat.abs() == clip).any()
    free = option(sampler, spacing, 5)(denoiser, Linear(), normals(64, 2))
    assert free.abs().max() > clip


@every("sampler")
def test_a_sample_does_not_depend_on_its_batch(sampler):
    """In float32, along levels of the trained schedule."""
    found, denoiser = option(sampler, steps=20), triangle()
    whole = found(denoiser, Cosine(), Noise(5, range(9), (2,)))
    for ids in ([0], [4, 5, 6], [8, 1]):
        part = found(denoiser, Cosine(), Noise(5, ids, (2,)))
        torch.testing.assert_close(part, whole[ids], rtol=0, atol=1e-5)
    assert (found(denoiser, Cosine(), Noise(6, range(9), (2,))) - whole).abs().max() > 0.1


def test_a_samples_noise_has_the_same_bits_in_every_batch():
    whole, part, other = Noise(3, range(6), (1, 4, 4)), Noise(3, [5, 2], (1, 4, 4)), Noise(4, range(6), (1, 4, 4))
    draws = [whole() for _ in range(3)]
    for draw in draws:
        assert torch.equal(part(), draw[[5, 2]])
        assert not (other() == draw).any()
    everything = torch.stack(draws)
    assert len(everything.unique()) == everything.numel()


def test_addressed_noise_is_standard_normal_over_samples_and_draws():
    source = Noise(0, range(500), (8,))
    draws = torch.stack([source() for _ in range(5)]).double()  # (draw, sample, value)
    assert abs(draws.mean()) < 4 / math.sqrt(20_000)
    assert abs(draws.std() - 1) < 4 / math.sqrt(40_000)
    between = torch.corrcoef(draws.transpose(0, 1).reshape(500, 40).T)
    assert (between - torch.eye(40)).abs().max() < 5 / math.sqrt(500)


# What a walk reaches


@every("sampler", "spacing", "schedule")
def test_few_steps_find_the_mean_and_width_of_gaussian_data(sampler, spacing, schedule):
    torch.manual_seed(1)
    levels, noise = make("schedule", schedule), normals(4000, 1)
    x_0 = option(sampler, spacing, 50)(White(0.3, 0.5), levels, noise)
    assert abs(x_0.mean() - 0.3) < 0.05
    assert x_0.std().item() == pytest.approx(0.5, rel=0.15)


@every("sampler")
def test_every_sampler_as_it_is_shipped_suits_the_points(sampler):
    """Which lie outside of [-1, 1], unlike images."""
    torch.manual_seed(1)
    found = parts("experiment=points", f"sampler={sampler}", "data.n=2000")
    data, codec = found.data, found.codec
    exact = Mixture((data.centres - codec.mean) / codec.std, data.std / codec.std)
    x_0 = make("sampler", sampler, spacing=found.spacing, steps=50)(exact, found.schedule, normals(4000, 2))
    assert x_0.std().item() == pytest.approx(1, rel=0.05)


@every("spacing", "schedule")
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_many_steps_follow_the_flow_of_gaussian_data(sampler, spacing, schedule):
    """Sample by sample, against the solution in closed form."""
    found, levels, exact = option(sampler, spacing, 400), make("schedule", schedule), White(0.3, 0.5)
    first, *_, clean = found.levels(levels)
    x = normals(500, 1)
    error = rms(found(exact, levels, x) - exact.flow(first.sigma * x, first, clean))
    assert error < (0.006 if found.order == 1 else 6e-4)


@every("schedule")
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_the_error_falls_at_the_samplers_order(sampler, schedule):
    """The slope of log error against log N from the first to the last noisy level, against a fourth-order
    solution of the flow."""
    levels, x, errors = make("schedule", schedule), normals(64, 2), []
    for steps in (64, 128, 256, 512):
        found = option(sampler, "log_snr", steps)
        first, *_, last, _ = found.levels(levels)
        if not errors:
            expected = solve(triangle(), first.sigma * x, first, last, 1000)
        *_, state, _ = found.walk(triangle(), levels, x)
        errors.append(rms(state.x_t - expected))
    slopes = [math.log2(before / after) for before, after in itertools.pairwise(errors)]
    assert errors[0] > 1e-4  # far from rounding, so that the slope is the method's
    assert found.order - 0.2 < min(slopes)
    assert max(slopes) < found.order + 0.5


@every("schedule")
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_thousand_ancestral_steps_make_gaussian_data(schedule, variance):
    """fixed_large is the exact reversal for unit variance, but for the ends."""
    torch.manual_seed(1)
    n = 10_000
    found = option("ddpm", "trailing", 1000, variance=variance)
    x_0 = found(White(0.3, 1.0), make("schedule", schedule), normals(n, 1))
    assert abs(x_0.mean().item() - 0.3) < 4 / math.sqrt(n)
    assert abs(x_0.std().item() - 1) < 4 / math.sqrt(2 * n)


@every("schedule")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_any_eta_keeps_the_margins(schedule, eta):
    """The width at every level of the walk, for data of unit variance."""
    torch.manual_seed(1)
    n = 10_000
    *states, _ = option("ddim", "trailing", 250, eta=eta).walk(White(), make("schedule", schedule), normals(n, 1))
    widths = torch.stack([state.x_t.std() for state in states[::25]])
    assert (widths - 1).abs().max() < 4 / math.sqrt(2 * n) + 0.02


def test_fixed_small_is_right_for_a_single_point_and_fixed_large_too_wide():
    """For data that is one point, x_s given x_t has beta tilde's variance: at every level the width is sigma_s."""
    torch.manual_seed(1)
    levels, point = make("schedule", "cosine"), White(0.7, 1e-6)
    for variance, right in (("fixed_small", True), ("fixed_large", False)):
        *states, _ = option("ddpm", "trailing", 20, variance=variance).walk(point, levels, normals(20_000, 1))
        ratio = torch.stack([state.x_t.std() / state.level.sigma for state in states])
        assert ((ratio - 1).abs().max() < 0.02) == right


# Invariance


@every("sampler", "spacing", "schedule")
@pytest.mark.parametrize("k", [0.1, 80.0, None])
def test_the_scale_of_the_levels_does_not_matter(sampler, spacing, schedule, k):
    """None is variance exploding. The denoiser is exact at any scale; noise is addressed."""
    levels, steps = make("schedule", schedule), 13
    for arguments in [{"eta": 0.0}, {"eta": 1.0}] if sampler == "ddim" else [{}]:
        found = option(sampler, spacing, steps, **arguments)
        expected = found(triangle(), levels, addressed(16, 2))
        assert relative(found(triangle(), Scaled(levels, k), addressed(16, 2)), expected) < 1e-8


@every("spacing", "schedule")
def test_ddim_with_all_its_noise_is_ddpm_with_small_variance(spacing, schedule):
    levels = make("schedule", schedule)
    for steps in (1, 2, 20):
        ddim, ddpm = option("ddim", spacing, steps, eta=1.0), option("ddpm", spacing, steps, variance="fixed_small")
        expected = [state.x_t for state in ddpm.walk(triangle(), levels, addressed(8, 2))]
        for state, x_t in zip(ddim.walk(triangle(), levels, addressed(8, 2)), expected, strict=True):
            torch.testing.assert_close(state.x_t, x_t, rtol=0, atol=1e-7)


@every("sampler", "spacing")
def test_a_schedule_that_reaches_the_data_can_be_sampled(sampler, spacing):
    """The last noisy level may be free of noise."""
    x_0 = option(sampler, spacing, 10)(triangle(), Power(0.01), addressed(8, 2))
    assert x_0.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize(
    ("name", "arguments"), [("ddim", {}), ("ddim", {"eta": 0.3}), ("ddim", {"eta": 1.0}), ("ddpm", {})]
)
def test_a_first_step_from_nothing_but_noise_is_finite(name, arguments, alpha):
    """At any pair of levels, where sigma_s^2 - d^2 is nearly zero and must not be rounded to less."""
    found, x_t = option(name, **arguments), torch.ones(1, 1, dtype=torch.float64)
    draws = torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma_s, sigma_t in (80 * draws).sort(1).values.tolist():
        t, s = Rung(max(alpha, sigma_t / RATIO), sigma_t), Rung(0.5, sigma_s)
        x_s = found.step(lambda x, level: 0 * x, x_t, t, s, Cosine(), lambda: 0 * x_t, {})
        assert x_s.isfinite().all(), (sigma_t, sigma_s)


# A second implementation


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
        ours = found.step(lambda *_, y=x_0_hat: y, x_t, t, s, schedule, lambda: normals(4, 8, seed=7), {})
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
    schedule = make("schedule", "linear" if "beta_start" in betas else "cosine")
    found, exact = option("ddim", "leading", 50), triangle()
    x = found.levels(schedule)[0].sigma * Noise(0, range(8), (2,))()
    for index in reference.timesteps.tolist():
        alpha, sigma = schedule(torch.full((8, 1), index / 999))
        x = reference.step(exact(x, alpha, sigma), index, x).prev_sample
    assert (found(exact, schedule, Noise(0, range(8), (2,))) - x).abs().max() <= 1e-5


# Refusals


@pytest.mark.parametrize(
    ("group", "name", "key", "value"),
    [
        *(("sampler", name, "steps", value) for name in OPTIONS["sampler"] for value in (0, -3)),
        *(("sampler", name, "clip", value) for name in OPTIONS["sampler"] for value in (0, -1.0, math.nan)),
        *(("sampler", "ddim", "eta", value) for value in (1.5, -0.1, math.nan)),
        ("sampler", "ddpm", "variance", "learned"),
        *(("spacing", "karras", key, value) for key in ("rho", "sigma_max") for value in (0, -1.0, math.nan)),
    ],
)
def test_bad_arguments_are_refused_in_a_line(group, name, key, value):
    with pytest.raises(UserError) as refused:
        make(group, name, **{key: value})
    line = str(refused.value)
    assert line.startswith(f"{group}.{key}={value}: ")
    assert "need" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sampler.steps=0"], "sampler.steps=0: need"),
        (["spacing=karras", "spacing.rho=0"], "spacing.rho=0: need"),
        (["spacing=trailing", "sampler.steps=1001"], "sampler.steps=1001: "),
    ],
)
def test_a_run_names_the_option_that_is_wrong(overrides, named):
    with pytest.raises(UserError) as refused:
        parts(*overrides).check_sampler(parts(*overrides).denoiser)
    assert str(refused.value).startswith(named)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spacing", [spacing for spacing, _ in GRIDS])
@pytest.mark.parametrize("steps", [1001, 5000])
def test_more_steps_than_points_are_refused_in_a_line(spacing, steps):
    with pytest.raises(ValueError, match=rf"^steps={steps}: [^\n]*at most 1000 steps$"):
        DDIM(spacing(), steps).levels(Linear())
