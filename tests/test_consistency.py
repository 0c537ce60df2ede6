"""Consistency models: the boundary, sampling in any number of steps, and the grid of levels."""

import math

import pytest
import torch
from torch import Tensor

from denoiselab.consistency import Consistency
from denoiselab.loss import Doubling, Fixed, SquareRoot
from denoiselab.sampler import Consistency as Multistep
from denoiselab.sampler import Karras, Rung, Walk
from denoiselab.schedule import Cosine, Schedule
from exact import White, every, make, noisy_levels, normals, relative, times
from students import R_MIN, Ends, training, wave

# The target


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_at_the_end_of_its_path_the_estimate_is_the_input(sigma_data):
    """Whatever the network says, at r_min and below."""
    target, y, x_t = Consistency(sigma_data), 1e3 * normals(5, 3, seed=1), normals(5, 3, seed=2)
    for dtype in (torch.float32, torch.float64):
        x = x_t.to(dtype)
        one, r = torch.ones(5, 1, dtype=dtype), torch.tensor([[R_MIN], [1e-3], [1e-4], [1e-6], [0.0]], dtype=dtype)
        assert torch.equal(target.to_x_0(y.to(dtype), x, one, r), x)
        assert not target.to_eps(y.to(dtype)[:4], x[:4], one[:4], r[:4]).any()
    for scale in (0.3, 80.0):
        scaled = target.to_x_0(y, scale * x_t, scale * one, scale * r)
        torch.testing.assert_close(scaled, x_t, rtol=1e-12, atol=1e-12)
    assert (target.to_x_0(y, x_t, one, r + 0.01) != x_t).all()


@every("schedule")
def test_diffusers_scales_the_network_the_same_way(schedule):
    from diffusers import CMStochasticIterativeScheduler

    reference = CMStochasticIterativeScheduler(sigma_data=0.5)
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    r = sigma_t / alpha_t
    kept = (r > R_MIN)[:, 0]
    alpha_t, sigma_t, r = alpha_t[kept], sigma_t[kept], r[kept]
    x_t, y = normals(len(r), 4, seed=1), normals(len(r), 4, seed=2)
    c_skip, c_out = reference.get_scalings_for_boundary_condition(r)
    found = Consistency(0.5).to_x_0(y, x_t, alpha_t, sigma_t)
    torch.testing.assert_close(found, c_skip * x_t / alpha_t + c_out * y, rtol=1e-10, atol=1e-10)


# The sampler


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_diffusers_takes_the_same_steps(n):
    """On its own grid of 40 levels, in its own float32."""
    from diffusers import CMStochasticIterativeScheduler

    reference = CMStochasticIterativeScheduler(clip_denoised=False)
    reference.set_timesteps(n)
    levels = [Rung(1.0, sigma) for sigma in reference.sigmas.tolist()[:-1]] + [Rung(1.0, 0.0)]
    found = Multistep(Karras(), n)
    x = 80 * normals(4, 8).float()
    for i, time in enumerate(reference.timesteps):
        y = normals(4, 8, seed=i + 1).float()
        reference.scale_model_input(x, time)
        theirs = reference.step(y, time, x, generator=torch.Generator().manual_seed(i)).prev_sample
        z = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        t, s = levels[i], levels[i + 1]
        x_0_hat = Consistency(0.5).to_x_0(y, x, *t.like(x))
        walk = Walk(lambda *_, f=x_0_hat: f, Cosine(), lambda z=z: z)
        ours = found.step(walk, x, t, s) if s.sigma else found.finish(walk, x, t)
        assert relative(ours, theirs) < 1e-5
        x = theirs


@every("schedule")
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_consistency_function_makes_samples_of_the_right_law_in_any_number_of_steps(schedule, steps):
    """And the law of noisy data at every level on the way. r_min is large, to be seen."""
    torch.manual_seed(1)
    n, data = 20_000, White(0.3, 0.5)
    found = Multistep(Karras(), steps, sigma_min=0.3)
    first, *states = found.walk(Ends(data, 0.3), Bounded(make("schedule", schedule)), normals(n, 1))
    for x, level, *_ in states:
        width = math.hypot(0.5, max(level.ratio, 0.3)) * level.alpha
        assert abs(x.std().item() / width - 1) < 4 / math.sqrt(2 * n)
        unseen = 0.3 * width / first.level.ratio  # of the mean, in pure noise
        assert abs(x.mean().item() - 0.3 * level.alpha) < 4 * width / math.sqrt(n) + unseen


class Bounded(Schedule):
    """The levels of a schedule from sigma/alpha = 0.3 to at most 80."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        first = torch.maximum(schedule.log_snr(torch.ones(()).double()), torch.tensor(-2 * math.log(80)).double())
        self.schedule, self.first, self.last = schedule, first, torch.tensor(-2 * math.log(0.3)).double()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.at(self.last + t * (self.first - self.last))


def test_a_plain_denoiser_gives_samples_that_are_too_narrow():
    """However many steps: the mean of many ends is not one of them."""
    for steps in (10, 50, 250):
        torch.manual_seed(1)
        assert Multistep(Karras(), steps)(White(0.3, 0.5), Cosine(), normals(2000, 1)).std() < 0.45


def test_the_walk_starts_where_consistency_models_are_trained_and_skips_the_end_of_the_path():
    for n in (1, 2, 5):
        levels = Multistep(Karras(), n).levels(Cosine())
        assert len(levels) == n + 1
        assert levels[0].ratio == pytest.approx(80)
        expected = (80 ** (1 / 7) + torch.arange(n + 1) / n * (levels_end() ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert [level.ratio for level in levels[:-1]] == pytest.approx(expected[:-1].tolist(), rel=1e-5)
        assert levels[-1] == (1.0, 0.0)


def levels_end() -> float:
    return (Cosine().log_snr(torch.zeros(()).double()) / -2).exp().item()


# The grid


def test_the_number_of_levels_follows_the_samples():
    doubling, root = Doubling(10, 1280, every=50), SquareRoot(2, 150, over=400)
    assert [doubling(50 * k) for k in range(10)] == [11, 21, 41, 81, 161, 321, 641, 1281, 1281, 1281]
    assert doubling(49) == 11
    for k in range(0, 401, 7):
        assert root(k) == math.ceil(math.sqrt(k / 400 * (151**2 - 2**2) + 2**2) - 1) + 1
    assert root(10_000) == 151
    loss = training(wave(), Doubling(every=50))
    assert loss.n == 11
    loss.advance(120)
    assert loss.n == 41
    again = training(wave(), Doubling(every=50))
    again.load_state_dict(loss.state_dict())
    assert again.n == 41


@every("schedule")
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_a_time_stands_for_the_neighbouring_levels_around_it(schedule, rho):
    found, n = make("schedule", schedule), 12
    loss = training(wave(), Fixed(n), rho=rho, sigma_max=20.0)
    t = times(4000)
    low, high = loss.pairs(found, t)
    last = min(20.0, found.log_snr(torch.ones(()).double()).div(-2).exp().item())
    root = torch.tensor([R_MIN, last], dtype=torch.float64) ** (1 / rho)
    grid = torch.stack([(root[0] + i / (n - 1) * (root[1] - root[0])) ** rho for i in range(n)])
    r = (found.log_snr(t) / -2).exp()
    index = (grid <= r).sum(1, keepdim=True).sub(1).clamp(0, n - 2)
    torch.testing.assert_close(low, grid[index], rtol=1e-5, atol=0)
    torch.testing.assert_close(high, grid[index + 1], rtol=1e-5, atol=0)
    inside = (r >= R_MIN) & (r < last)
    assert ((low <= r) & (r < high))[inside].all()
    assert (low[r >= last] == low.max()).all()


def test_every_pair_is_drawn_with_the_probability_of_its_interval():
    """Of uniform t on the cosine schedule."""
    loss, schedule = training(wave(), Fixed(11)), Cosine()
    low, high = loss.pairs(schedule, times(200_000))
    edges = torch.cat([low.unique(), high.max()[None]])
    assert len(edges) == 11
    ends = schedule.inverse(-2 * edges.log())
    ends[0], ends[-1] = 0, 1
    share = torch.stack([(low == edge).double().mean() for edge in edges[:-1]])
    torch.testing.assert_close(share, ends.diff(), rtol=0, atol=1e-4)
