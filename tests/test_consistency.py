import copy
import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.consistency import Consistency
from denoiselab.data import EightGaussians
from denoiselab.denoiser import Denoiser
from denoiselab.loss import (
    Averaged,
    ConsistencyDistillation,
    ConsistencyTraining,
    Doubling,
    Fixed,
    Online,
    Progressive,
    PseudoHuber,
    SquaredError,
    SquareRoot,
)
from denoiselab.metrics.mmd import mmd2, splits
from denoiselab.models import MLP
from denoiselab.module import parameter_groups
from denoiselab.sampler import DDIM, Heun, Karras, Rung, Trailing, Walk
from denoiselab.sampler import Consistency as Multistep
from denoiselab.schedule import Cosine, Linear, Schedule
from denoiselab.target import V
from denoiselab.weighting import MinSNR
from exact import ExactNet, Mixture, Scaled, White, every, make, noisy_levels, normals, relative, solve, triangle

R_MIN = 0.002


class Teacher(nn.Module):
    """An exact denoiser where a trained one is expected."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.weight = exact, nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        return self.exact(*(value.double() for value in (x_t, alpha_t, sigma_t)), **cond).to(x_t.dtype)


class Ends:
    """The consistency function of Gaussian data: where the flow is at r_min."""

    def __init__(self, data: White, r_min: float = R_MIN):
        self.data, self.r_min = data, r_min

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        mean, std = self.data.mean, self.data.std
        z = (x_t - alpha_t * mean) / torch.sqrt((alpha_t * std) ** 2 + sigma_t**2)
        return mean + math.hypot(std, self.r_min) * z


class Wave(nn.Module):
    """A small smooth network with one weight."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return (self.weight * x + c_noise[:, None]).sin()


def wave(target: Consistency | None = None) -> Denoiser:
    return Denoiser(Wave(), target or Consistency())


def training(denoiser: Denoiser, levels=None, distance=None, **arguments) -> ConsistencyTraining:
    levels, distance = levels or Fixed(18), distance or PseudoHuber()
    return ConsistencyTraining(denoiser.target, denoiser, levels, distance, **arguments)


def distillation(teacher, denoiser: Denoiser, n: int = 18, distance=None, **arguments) -> ConsistencyDistillation:
    distance = distance or PseudoHuber()
    return ConsistencyDistillation(Teacher(teacher), denoiser.target, denoiser, Fixed(n), distance, **arguments)


def times(n: int) -> Tensor:
    return ((torch.arange(n).double() + 0.5) / n)[:, None]


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


# The losses


def test_the_loss_is_the_distance_of_neighbouring_estimates_over_their_gap():
    denoiser, schedule, t = wave(Consistency(0.5)), Linear(), times(32)
    x_0, eps, one = normals(32, 3, seed=1), normals(32, 3, seed=2), torch.ones(32, 1).double()
    for distance in (PseudoHuber(0.01), SquaredError()):
        loss = training(denoiser, Fixed(9), distance)
        r, r_next = loss.pairs(schedule, t)
        found, aim = (denoiser(x_0 + level * eps, one, level) for level in (r_next, r))
        square = (found - aim.detach()).square().sum(1)
        value = (square + 3e-4).sqrt() - math.sqrt(3e-4) if isinstance(distance, PseudoHuber) else square / 3
        expected = value / (r_next - r)[:, 0]
        (gradient,) = torch.autograd.grad(expected.sum(), denoiser.net.weight)
        got, told = loss(denoiser, schedule, x_0, eps, t)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(told["mse"], (found - x_0).square().mean(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), denoiser.net.weight)[0], gradient, rtol=1e-8, atol=0)
        assert not told["mse"].requires_grad


def test_pseudo_huber_is_square_near_zero_and_straight_far_away():
    distance, d = PseudoHuber(0.1), normals(8, 4)
    c = 0.1 * 2
    torch.testing.assert_close(distance(1e-5 * d), (1e-5 * d).square().sum(1) / (2 * c), rtol=1e-6, atol=0)
    torch.testing.assert_close(distance(1e6 * d), (1e6 * d).norm(dim=1) - c, rtol=1e-9, atol=0)
    assert not distance(0 * d).any()


@pytest.mark.parametrize("teacher", [White(0.3, 0.5), triangle()], ids=["white", "mixture"])
def test_the_distilled_pair_lies_on_one_path_to_third_order(teacher):
    """Heun's step from r_{n+1} to r_n, against the flow solved finely."""
    x_0, eps, errors = normals(16, 2, seed=1), normals(16, 2, seed=2), []
    for gap in (0.2, 0.1, 0.05):
        r_next, r = torch.full((16, 1), 0.9).double(), torch.full((16, 1), 0.9 - gap).double()
        noisier = x_0 + r_next * eps
        found = distillation(teacher, wave()).cleaner(x_0, eps, noisier, r, r_next)
        expected = solve(teacher, noisier, Rung(1.0, 0.9), Rung(1.0, 0.9 - gap), 50)
        errors.append((found - expected).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) > 2.6
    assert math.log2(errors[1] / errors[2]) > 2.7


def test_the_exact_consistency_function_costs_nothing_but_the_teachers_own_error():
    """Of Gaussian data; a wrong function of the same data costs a thousand times more."""
    data, target, schedule, t = White(0.0, 0.5), Consistency(0.5), Cosine(), times(200)
    x_0, eps = 0.5 * normals(200, 2, seed=1), normals(200, 2, seed=2)
    cost = {}
    for n in (18, 180):
        for name, function in {"right": Ends(data), "wrong": data}.items():
            denoiser = Denoiser(ExactNet(function, target, 0.5), target, 0.5)
            loss, _ = distillation(data, denoiser, n, SquaredError())(denoiser, schedule, x_0, eps, t)
            cost[name, n] = loss.mean().item()
    assert cost["right", 180] < cost["right", 18] / 1000
    assert cost["right", 180] < cost["wrong", 180] / 1000


def test_both_evaluations_draw_the_same_dropout():
    masks = []

    class Drops(Wave):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            masks.append(nn.functional.dropout(torch.ones(8), 0.5, self.training))
            return super().forward(x, c_noise)

    denoiser = Denoiser(Drops(), Consistency())
    for network in (Online, Averaged):
        loss = training(denoiser, target_network=network)
        for mode in (True, False):
            for _ in range(2):
                loss(denoiser.train(mode), Cosine(), normals(8, 2), normals(8, 2), times(8))
            first, second, third, fourth = masks
            assert torch.equal(first, second)
            assert torch.equal(third, fourth)
            assert torch.equal(first, third) != mode
            assert (first == 1).all() != mode
            masks.clear()


class TestAveraged:
    def test_it_follows_at_the_rate_of_its_paper_and_starts_where_the_run_starts(self):
        denoiser = wave()
        loss = training(denoiser, SquareRoot(2, 150, over=100), target_network=lambda d: Averaged(d, mu_0=0.9))
        with torch.no_grad():
            denoiser.net.weight.fill_(3.0)  # weights that were loaded after the loss was made
        loss.advance(0)
        loss(denoiser, Cosine(), normals(4, 2), normals(4, 2), times(4))
        average = loss.target_network.model.net.weight
        assert average == 3
        expected = 3.0
        for k in (0, 10, 20, 100):
            loss.advance(k)
            with torch.no_grad():
                denoiser.net.weight.fill_(5.0 + k)
            loss.after_step(denoiser)
            mu = math.exp(2 * math.log(0.9) / loss.n)
            expected = mu * expected + (1 - mu) * (5.0 + k)
            assert average.item() == pytest.approx(expected, rel=1e-6)

    def test_it_is_what_the_noisier_estimate_is_pulled_to(self):
        denoiser = wave()
        loss = training(denoiser, target_network=Averaged)
        loss.advance(1)
        arguments = (Cosine(), normals(8, 2, seed=1), normals(8, 2, seed=2), times(8))
        before, _ = loss(denoiser, *arguments)
        with torch.no_grad():
            loss.target_network.model.net.weight.add_(1.0)
        assert ((loss(denoiser, *arguments)[0] - before).abs() > 1e-3).any()

    def test_it_is_saved_and_is_no_part_of_what_is_optimised(self):
        denoiser = wave()
        loss = training(denoiser, target_network=Averaged)
        assert "target_network.model.net.weight" in loss.state_dict()
        assert not parameter_groups(loss)
        assert set(training(denoiser).state_dict()) == {"samples_seen"}

    def test_it_stays_float32(self):
        loss = training(wave(), target_network=Averaged).to(torch.bfloat16)
        assert loss.target_network.model.net.weight.dtype == torch.float32


class TestFrozen:
    def test_a_teacher_is_no_part_of_parameters_or_state_and_gets_no_gradient(self):
        denoiser = wave()
        loss = distillation(triangle(), denoiser)
        assert not list(loss.parameters())
        assert set(loss.state_dict()) == {"samples_seen"}
        (teacher,) = loss.teacher._held
        assert not teacher.weight.requires_grad
        assert not teacher.training
        loss.train()
        assert not teacher.training
        assert copy.deepcopy(loss).teacher._held[0] is not teacher

    def test_a_teacher_follows_the_device_and_not_the_dtype(self):
        loss = distillation(triangle(), wave())
        assert loss.to(torch.bfloat16).teacher._held[0].weight.dtype == torch.float32
        assert loss.to("meta").teacher._held[0].weight.device.type == "meta"


# Progressive distillation


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_one_step_of_the_student_lands_where_two_of_the_teacher_land(schedule):
    """The loss of a network that answers x_0 = 0 is the weighted square of the aim."""
    found, steps, exact = make("schedule", schedule), 5, triangle()
    weigh, t = MinSNR(5.0), times(200)
    loss = Progressive(Teacher(exact), found, Trailing(), weigh, steps)
    x_0, eps = normals(200, 2, seed=1), normals(200, 2, seed=2)
    silent = Teacher(lambda x, *level: 0 * x)
    value, told = loss(silent, found, x_0, eps, t)
    torch.testing.assert_close(told["mse"], x_0.square().mean(1))
    fine, coarse = (DDIM(Trailing(), n).levels(found) for n in (2 * steps, steps))
    assert [level.ratio for level in fine[::2]] == pytest.approx([level.ratio for level in coarse])
    edges = Trailing()(found, steps)
    for k in (0, 17, 60, 111, 170, 199):
        i = int((edges >= t[k]).sum()) - 1  # the last of the falling times at or above t
        start, middle, end = fine[2 * i], fine[2 * i + 1], fine[2 * i + 2]
        x_t = start.alpha * x_0[k : k + 1] + start.sigma * eps[k : k + 1]
        walk, teacher = Walk(exact, found), DDIM(Trailing(), 2)
        x_u = teacher.step(walk, x_t, start, middle)
        x_s = teacher.step(walk, x_u, middle, end) if end.sigma else teacher.finish(walk, x_u, middle)
        kept = end.sigma / start.sigma
        aim = (x_s - kept * x_t) / (end.alpha - kept * start.alpha)
        level = torch.tensor(start.alpha), torch.tensor(start.sigma), torch.ones(())
        expected = weigh.weight(*level) * aim.square().mean()
        assert value[k].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_scale_of_the_levels_does_not_matter():
    denoiser, x_0, eps, t = wave(), normals(16, 2, seed=1), normals(16, 2, seed=2), times(16)
    for loss in (training(denoiser), distillation(triangle(), denoiser)):
        expected, _ = loss(denoiser, Cosine(), x_0, eps, t)
        found, _ = loss(denoiser, Scaled(Cosine(), 80.0), x_0, eps, t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["training", "distillation", "progressive"])
def test_levels_keep_their_precision_where_the_data_does_not(name):
    """Neighbours of 1,281 levels are one in bfloat16."""
    denoiser = Denoiser(Wave(torch.float32), Consistency())
    exact = Teacher(triangle())
    loss = {
        "training": lambda: training(denoiser, Fixed(1281)),
        "distillation": lambda: distillation(triangle(), denoiser, 1281),
        "progressive": lambda: Progressive(exact, Cosine(), Trailing(), MinSNR(), 400),
    }[name]()
    x_0, eps, t = normals(64, 2, seed=1).bfloat16(), normals(64, 2, seed=2).bfloat16(), times(64).float()
    found, _ = loss(denoiser, Cosine(), x_0, eps, t)
    expected, _ = loss(denoiser, Cosine(), x_0.float(), eps.float(), t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# Learning


def eight() -> Mixture:
    data = EightGaussians(n=4000)
    return Mixture((data.centres - data.codec.mean) / data.codec.std, data.std / data.codec.std)


def learn(loss_of, steps: int, batch: int, exact: Mixture, measure=None) -> Denoiser:
    """An average of the weights of a small network after so many steps."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), width=64, depth=3), Consistency())
    loss, average = loss_of(denoiser), Averaged(denoiser, mu_0=0.99)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    for k in range(steps):
        torch.manual_seed(k)
        loss.advance(k * batch)
        x_0 = exact.draw(batch, seed=100 + k)[0].float()
        t = ((torch.arange(batch) + torch.rand(batch)) / batch)[:, None]
        value, _ = loss(denoiser, Cosine(), x_0, torch.randn_like(x_0), t)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 4 * (1 - k / steps))
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
        loss.after_step(denoiser)
        average.follow(denoiser, 1.0)
        if measure is not None and k + 1 in measure:
            measure[k + 1](average.model)
    return average.model.eval()


def distances(denoiser, exact: Mixture, n: int = 2000) -> tuple[float, float, float, float]:
    """mmd2 of one-step and two-step samples and of the teacher's, and the 95 % quantile of its null."""
    real = exact.draw(n, seed=1)[0]
    med = torch.pdist(real).median().item()
    null = splits(exact.draw(2 * n, seed=2)[0], n, med).quantile(0.95).item()
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    found = []
    for sampler, network in ((Multistep(Karras(), 1), denoiser), (Multistep(Karras(), 2), denoiser)):
        torch.manual_seed(4)
        found.append(mmd2(sampler(network, Cosine(), noise).double(), real, med))
    teacher = mmd2(Heun(Karras(), 18)(exact, Cosine(), noise.double()), real, med)
    return found[0], found[1], teacher, null


def inconsistency(denoiser: Denoiser, exact: Mixture) -> float:
    """The spread of the estimates along the teacher's own trajectories, from r = 80 to the data."""
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(5))
    states = [s for s in Heun(Karras(), 18).walk(exact, Cosine(), noise.double()) if s.level.sigma]
    with torch.no_grad():
        ends = torch.stack([denoiser(s.x_t.float(), *s.level.like(s.x_t.float())) for s in states])
    return ends.var(0).mean().item()


def test_distillation_of_an_exact_teacher_learns_to_sample_in_one_step():
    exact, spreads = eight(), []
    note = {k: lambda model: spreads.append(inconsistency(model, exact)) for k in (20, 80, 300)}
    student = learn(lambda d: distillation(exact, d), 300, 128, exact, note)
    one, two, _, _ = distances(student, exact, 1000)
    assert one < 0.02
    assert two < 0.02
    assert spreads[0] > spreads[1] > spreads[2]


@pytest.mark.slow
def test_a_distilled_student_is_as_good_as_its_teacher_at_this_resolution():
    exact = eight()
    student = learn(lambda d: distillation(exact, d), 1000, 256, exact)
    one, two, teacher, null = distances(student, exact)
    print(f"one step {one:.5f}, two steps {two:.5f}, teacher {teacher:.5f}, null {null:.5f}")
    assert one < 3 * max(teacher, null)
    assert two < max(one, null)


@pytest.mark.slow
def test_consistency_training_needs_no_teacher():
    exact, steps = eight(), 1200
    student = learn(lambda d: training(d, Doubling(end=160, every=steps * 256 // 8)), steps, 256, exact)
    one, two, _, null = distances(student, exact)
    print(f"one step {one:.5f}, two steps {two:.5f}, null {null:.5f}")
    assert one < 10 * null
    assert two < 10 * null


# Refusals


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (lambda: Consistency(0.0), "sigma_data=0.0: need"),
        (lambda: Consistency(1.0, 0.0), "sigma_min=0.0: need"),
        (lambda: Multistep(Karras(), sigma_min=-1.0), "sigma_min=-1.0: need"),
        (lambda: Fixed(1), "n=1: need"),
        (lambda: Doubling(10, 5), "start=10, end=5: need"),
        (lambda: Doubling(every=0), "every=0: need"),
        (lambda: SquareRoot(0), "start=0, end=150: need"),
        (lambda: SquareRoot(over=0), "over=0: need"),
        (lambda: PseudoHuber(0.0), "c=0.0: need"),
        (lambda: Averaged(wave(), 1.0), "mu_0=1.0: need"),
        (lambda: training(Denoiser(Wave(), V())), "target=V: need target=consistency"),
        (lambda: training(wave(), sigma_max=0.001), "sigma_max=0.001: need"),
        (lambda: training(wave(), rho=0.0), "rho=0.0: need"),
        (lambda: Progressive(Teacher(triangle()), Cosine(), Trailing(), MinSNR(), 0), "steps=0: need"),
        (lambda: Progressive(Teacher(triangle()), Cosine(), Trailing(), MinSNR(), 501), "steps=1002: "),
    ],
)
def test_bad_arguments_are_refused_in_a_line(made, line):
    with pytest.raises(ValueError, match=rf"^{line}[^\n]*$"):
        made()
