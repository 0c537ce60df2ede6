"""Consistency training, its distillation, and progressive distillation: the losses."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.consistency import Consistency
from denoiselab.denoiser import Denoiser
from denoiselab.loss import Averaged, Doubling, Fixed, Online, Progressive, PseudoHuber, SquaredError, SquareRoot
from denoiselab.module import parameter_groups
from denoiselab.sampler import DDIM, Karras, Rung, Trailing, Walk
from denoiselab.sampler import Consistency as Multistep
from denoiselab.schedule import Cosine, Linear
from denoiselab.target import V
from denoiselab.weighting import MinSNR
from exact import ExactNet, Scaled, White, make, normals, solve, times, triangle
from students import Ends, Teacher, Wave, distillation, training, wave

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
