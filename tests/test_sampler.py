"""What a walk is: its levels, calls, conditions, clipping and noise; and the options that are refused."""

import math
import weakref

import pytest
import torch
from torch import Tensor

from denoiselab.checks import check_sampler
from denoiselab.errors import UserError
from denoiselab.rng import Noise
from denoiselab.sampler import DDIM, Leading, Linspace, Sampler, Trailing, Walk
from denoiselab.schedule import Cosine, Linear
from exact import OPTIONS, every, make, normals, parts, triangle
from walks import DETERMINISTIC, Counting, Unsure, option, schedule_of


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
def test_a_walk_keeps_no_more_states_than_its_method_needs(sampler):
    """Called for its end alone: what the network was shown goes as the walk goes on."""
    shown, most = [], 0

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        nonlocal most
        shown.append(weakref.ref(x_t))
        most = max(most, sum(each() is not None for each in shown))
        return 0.5 * x_t

    option(sampler, steps=20)(Unsure(denoiser), Cosine(), normals(2, 2))
    assert most <= 5


def test_a_sampler_is_its_step_between_noisy_levels_and_ends_with_the_estimate():
    """Which is had at the last of them; the path is there to ask for levels in between."""

    class Middle(Sampler):
        def step(self, walk, x_t, t, s):
            assert t.ratio > s.ratio > 0
            middle = walk.at((t.half_log_snr + s.half_log_snr) / 2)
            assert middle.ratio**2 == pytest.approx(t.ratio * s.ratio, rel=1e-9)
            assert math.hypot(*middle) == pytest.approx(1, rel=1e-9)
            assert walk.noise().shape == x_t.shape
            walk.memory["steps"] = walk.memory.get("steps", 0) + 1
            return s.alpha * walk.denoise(x_t, t)

        def finish(self, walk, x_t, t):
            assert walk.memory == {"steps": 9}
            assert walk.calls == 9
            return super().finish(walk, x_t, t)

    found, denoiser = Middle(Trailing(), 10), triangle()
    *_, last, sample = found.walk(denoiser, Cosine(), normals(4, 2))
    assert torch.equal(sample.x_t, denoiser(last.x_t, *last.level.like(last.x_t)))
    assert sample.level == (1.0, 0.0)
    assert sample.calls == found.nfe == 10


def test_a_walk_without_noise_says_so_where_it_is_asked_for():
    t, s = DDIM(Trailing(), 2).levels(Cosine())[:2]
    with pytest.raises(RuntimeError, match="no noise"):
        DDIM(Trailing(), 2, eta=1.0).step(Walk(triangle(), Cosine()), normals(4, 2), t, s)


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
        check_sampler(parts(*overrides), parts(*overrides).denoiser)
    assert str(refused.value).startswith(named)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spacing", [Trailing, Leading, Linspace])
@pytest.mark.parametrize("steps", [1001, 5000])
def test_more_steps_than_points_are_refused_in_a_line(spacing, steps):
    with pytest.raises(ValueError, match=rf"^steps={steps}: [^\n]*at most 1000 steps$"):
        DDIM(spacing(), steps).levels(Linear())
