import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.errors import UserError
from denoiselab.guidance import DenoiserLike
from denoiselab.rng import Noise
from denoiselab.sampler import DDIM, Heun, Leading, Linspace, LogSNR, Rung, Sampler, Spacing, State, Trailing
from denoiselab.sampler.base import Denoise
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


class Unsure:
    """A denoiser that also says a variance, half way between its bounds, as a network with a head for it does."""

    def __init__(self, inner):
        self.inner = inner

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Outputs:
        x_0 = self.inner(x_t, alpha_t, sigma_t, **cond)
        return Outputs(x_0, torch.full_like(x_0, 0.5))

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        return self.inner(x_t, alpha_t, sigma_t, **cond)


class Ends:
    """Where the flow ends that x_t is on: what a consistency model learns, by Runge-Kutta."""

    def __init__(self, exact, steps: int = 20):
        self.exact, self.steps = exact, steps

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        t = Rung(*(level.flatten()[0].item() for level in (alpha_t, sigma_t)))
        return solve(self.exact, x_t, t, Rung(1.0, 0.002), self.steps)


def asked_by(sampler: str, exact) -> DenoiserLike:
    """What a sampler expects of a perfect network."""
    return Ends(exact) if sampler == "consistency" else Unsure(exact)


spacing_of = cache(lambda name: make("spacing", name))
schedule_of = cache(lambda name: make("schedule", name))


def option(name: str, spacing: str | Spacing = "log_snr", steps: int = 10, **arguments) -> Sampler:
    """An option without clipping, along a spacing of choice."""
    arguments.setdefault("clip", None)
    levels = spacing_of(spacing) if isinstance(spacing, str) else spacing
    return make("sampler", name, spacing=levels, steps=steps, **arguments)


def addressed(n: int, *shape: int, seed: int = 0) -> Noise:
    return Noise(seed, range(n), shape, dtype=torch.float64)


def is_stochastic(name: str) -> bool:
    source = Counting(addressed(1, 1))
    option(name, steps=3)(Unsure(White()), Cosine(), source)
    return source.calls > 1


STOCHASTIC = [name for name in OPTIONS["sampler"] if is_stochastic(name)]
DETERMINISTIC = [name for name in OPTIONS["sampler"] if name not in STOCHASTIC]
ORDERED = [name for name in DETERMINISTIC if option(name).order is not None]


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
        assert make("spacing", spacing)(found, steps)[-1].item() == pytest.approx(found.earliest, abs=1e-12)


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
    earliest = torch.tensor(found.earliest, dtype=torch.float64)
    assert log_snr[-1].item() == pytest.approx(found.log_snr(earliest).item(), abs=1e-9)


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


@every("sampler", "schedule")
def test_a_walk_visits_its_levels_and_counts_its_calls(sampler, schedule):
    for spacing in OPTIONS["spacing"]:
        found, levels = option(sampler, spacing, 7), schedule_of(schedule)
        denoiser, x = Counting(triangle()), normals(4, 2)
        states = list(found.walk(Unsure(denoiser), levels, x))
        expected = found.levels(levels)
        assert [state.level for state in states] == expected
        assert denoiser.calls == states[-1].calls
        assert found.nfe in (denoiser.calls, None)
        assert [state.calls for state in states] == sorted(state.calls for state in states)
        assert states[0].x_0_hat is None
        assert states[0].calls == 0
        assert torch.equal(states[0].x_t, expected[0].sigma * x)
        assert all(state.x_t.shape == state.x_0_hat.shape == x.shape for state in states[1:])
        if sampler in DETERMINISTIC:
            assert torch.equal(found(Unsure(triangle()), levels, x), states[-1].x_t)


@every("sampler")
def test_the_denoiser_gets_the_condition_and_levels_per_sample(sampler):
    label = torch.arange(4)

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        assert alpha_t.shape == sigma_t.shape == (4, 1, 1, 1)
        assert alpha_t.dtype == sigma_t.dtype == x_t.dtype == torch.float32
        assert cond == {"label": label}
        return 0.5 * x_t.requires_grad_()

    x_0 = option(sampler, steps=3)(Unsure(denoiser), Cosine(), torch.zeros(4, 1, 8, 8), label=label)
    assert x_0.dtype == torch.float32
    assert not x_0.requires_grad


@every("sampler", "spacing")
@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_clip_bounds_the_estimate(sampler, spacing, clip):
    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return 5 * x_t + 0.1

    _, *states = option(sampler, spacing, 5, clip=clip).walk(Unsure(denoiser), Linear(), normals(64, 2))
    for state in states:
        assert state.x_0_hat.abs().max() <= clip
    assert states[-1].x_t.abs().max() <= clip
    assert (states[-1].x_0_hat.abs() == clip).any()
    free = option(sampler, spacing, 5)(Unsure(denoiser), Linear(), normals(64, 2))
    assert free.abs().max() > clip


@every("sampler")
def test_a_sample_does_not_depend_on_its_batch(sampler):
    """In float32, along levels of the trained schedule. Adaptive steps depend on it, within their tolerances."""
    found, denoiser = option(sampler, steps=20), Unsure(triangle())
    whole = found(denoiser, Cosine(), Noise(5, range(9), (2,)))
    for ids in ([0], [4, 5, 6], [8, 1]):
        part = found(denoiser, Cosine(), Noise(5, ids, (2,)))
        torch.testing.assert_close(part, whole[ids], rtol=0, atol=1e-5 if found.nfe else 1e-4)
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


def quantiles(n: int) -> Tensor:
    """n values (n, 1) that are as normal as can be."""
    return math.sqrt(2) * torch.erfinv(torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64)[1::2, None])


@every("sampler", "schedule")
def test_few_steps_find_the_mean_and_width_of_gaussian_data(sampler, schedule):
    torch.manual_seed(1)
    noise = quantiles(200) if sampler in DETERMINISTIC else normals(4000, 1)
    for spacing in OPTIONS["spacing"]:
        x_0 = option(sampler, spacing, 50)(asked_by(sampler, White(0.3, 0.5)), schedule_of(schedule), noise)
        assert abs(x_0.mean() - 0.3) < 0.05, spacing
        assert x_0.std().item() == pytest.approx(0.5, rel=0.25), spacing


@every("sampler")
def test_every_sampler_as_it_is_shipped_suits_the_points(sampler):
    """Which lie outside of [-1, 1], unlike images."""
    torch.manual_seed(1)
    found = parts("experiment=points", f"sampler={sampler}", "data.n=2000")
    data, codec = found.data, found.codec
    exact = Mixture((data.centres - codec.mean) / codec.std, data.std / codec.std)
    shipped = make("sampler", sampler, spacing=found.spacing, steps=50)
    x_0 = shipped(asked_by(sampler, exact), found.schedule, normals(4000, 2))
    assert x_0.std().item() == pytest.approx(1, rel=0.05)


class ToData(Spacing):
    """A spacing, and t = 0 after it where it ends before."""

    def __init__(self, spacing: Spacing):
        self.spacing = spacing

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        times = self.spacing(schedule, steps)
        last = times.new_tensor([schedule.earliest])
        return times if times[-1] - last < 1e-9 else torch.cat([times, last])


class Untabled(Scaled):
    """A schedule without points, so that spacings even in t stay even."""

    def __init__(self, schedule: Schedule):
        super().__init__(schedule, 1.0)
        self.points = None


def reached(sampler: Sampler, denoiser: DenoiserLike, schedule: Schedule, x: Tensor) -> State:
    """The state at the last noisy level."""
    *_, state, _ = sampler.walk(denoiser, schedule, x)
    return state


def reached_from_exact_values(sampler: Sampler, denoiser: DenoiserLike, schedule: Schedule, x: Tensor) -> State:
    """The same, where the flow itself gave the first values that a multistep method needs."""
    levels, memory, denoise = sampler.levels(schedule)[:-1], {}, Denoise(denoiser)
    x_t = levels[0].sigma * x
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        x_s = sampler.step(denoise, x_t, t, s, schedule, lambda: x, memory)
        x_t = solve(denoiser, x_t, t, s, 50) if i < 3 else x_s
    return State(x_t, levels[-1], denoise.x_0_hat, denoise.calls)


@cache
def flow(first: Rung, last: Rung) -> Tensor:
    """Where the flow takes normals(16, 2) from one level to another."""
    return solve(triangle(), first.sigma * normals(16, 2), first, last, 3000)


@every("schedule")
@pytest.mark.parametrize("sampler", ORDERED)
def test_the_error_falls_at_the_samplers_order(sampler, schedule):
    """The slope of log error against log N over the last two doublings up to N = 512, from the first to the last
    noisy level. A multistep method of order 3 or 4 has it once it is under way."""
    levels = schedule_of(schedule)
    for spacing in ("log_snr", "karras") if schedule in ("ve", "edm") else ("log_snr",):
        errors = []
        for steps in (128, 512):
            found = option(sampler, spacing, steps)
            walk = reached_from_exact_values if found.order > 2 else reached
            first, *_, last, _ = found.levels(levels)
            errors.append(rms(walk(found, triangle(), levels, normals(16, 2)).x_t - flow(first, last)))
        assert errors[0] > 1e-7  # far from rounding, so that the slope is the method's
        assert math.log2(errors[0] / errors[1]) / 2 > found.order - 0.3, spacing


ALREADY_SMALL = {
    *(("dpm_solver_3", schedule) for schedule in ("sigmoid",)),
    *(("dpmpp_2m", schedule) for schedule in ("adaptive", "cosine")),
    *(("unipc", schedule) for schedule in ("adaptive", "cosine", "linear", "zero_terminal")),
    *(("unipc_b1", schedule) for schedule in ("sigmoid", "vp")),
}
"""Along a spacing that is even in t these have an error of 4e-6 to 3e-4 at 64 steps, which happens to be near a change
of its sign, or which the last long step then begins to be extrapolated to; it is no quarter of that at 512."""


@every("schedule")
@pytest.mark.parametrize("sampler", ORDERED)
def test_eight_times_the_steps_leave_a_quarter_of_the_error(sampler, schedule):
    """At most, along every spacing, sample by sample against the flow of Gaussian data, from the first level to t = 0.
    The 1,000 points of a table let no 512 be evenly spaced, as PNDM's weights need them."""
    exact, x = White(0.3, 0.5), quantiles(16)
    levels = Untabled(schedule_of(schedule)) if sampler == "pndm" else schedule_of(schedule)
    for spacing in OPTIONS["spacing"]:
        errors = []
        for steps in (64, 512):
            found = option(sampler, ToData(spacing_of(spacing)), steps)
            first, *_, last, _ = found.levels(levels)
            errors.append(rms(reached(found, exact, levels, x).x_t - exact.flow(first.sigma * x, first, last)))
        if not errors[1] <= max(errors[0] / 4, 5e-6):
            print("MISS", sampler, schedule, spacing, errors)
        assert errors[1] <= max(errors[0] / 4, 2e-4), (spacing, errors)


def test_the_flow_that_orders_are_measured_by_is_that_of_sixteen_thousand_steps_of_heun():
    found = Heun(LogSNR(), 16_384)
    first, *_, last, _ = found.levels(Cosine())
    assert rms(reached(found, triangle(), Cosine(), normals(16, 2)).x_t - flow(first, last)) < 1e-6
    exact, x = White(0.3, 0.5), quantiles(16)
    expected = exact.flow(first.sigma * x, first, last)
    assert rms(solve(exact, first.sigma * x, first, last, 3000) - expected) < 1e-10


@every("schedule")
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_stochastic_walk_keeps_the_moments_of_gaussian_data(sampler, schedule):
    """Within four standard errors, at four levels on the way and at its end, for data of unit variance."""
    torch.manual_seed(1)
    n = 5000
    found = option(sampler, "log_snr", 500)
    *states, sample = found.walk(asked_by(sampler, White(0.3)), schedule_of(schedule), normals(n, 1))
    for state in (*states[100::100], sample):
        width = math.hypot(*state.level)
        assert abs(state.x_t.mean().item() - 0.3 * state.level.alpha) < 4 * width / math.sqrt(n)
        assert abs(state.x_t.std().item() / width - 1) < 4 / math.sqrt(2 * n)


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
    widths = torch.stack([state.x_t.std() / math.hypot(*state.level) for state in states[::25]])
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


class Exploding(Schedule):
    """The same log-SNRs at alpha = 1."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule, self.points = schedule, schedule.points

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), (self.schedule.log_snr(t) / -2).exp()


@every("sampler", "schedule")
def test_the_scale_of_the_levels_does_not_matter(sampler, schedule):
    """The denoiser is exact at any scale; noise is addressed."""
    levels, denoiser = schedule_of(schedule), Unsure(triangle())
    scaled = itertools.cycle([Scaled(levels, 0.1), Scaled(levels, 80.0), Exploding(levels)])
    both = {"ddim": [{"eta": 0.0}, {"eta": 1.0}], "ddpm": [{"variance": "fixed_small"}, {"variance": "fixed_large"}]}
    for spacing, other in zip(OPTIONS["spacing"], scaled, strict=False):
        for arguments in both.get(sampler, [{}]):
            found = option(sampler, spacing, 9, **arguments)
            expected = found(denoiser, levels, addressed(4, 2))
            assert relative(found(denoiser, other, addressed(4, 2)), expected) < 1e-7, (spacing, other)


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
    x_0 = option(sampler, spacing, 10)(Unsure(triangle()), Power(0.01), addressed(8, 2))
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
