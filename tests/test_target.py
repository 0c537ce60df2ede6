import pytest
import torch

from denoiselab.target import V
from exact import OPTIONS, Scaled, every, make, noisy_levels, normals, relative


@every("target", "schedule")
@pytest.mark.parametrize("k", [1e-3, 0.1, 80.0, None])
def test_coefficients_are_homogeneous_of_degree_0(target, schedule, k):
    """None scales every level by its own 1/alpha_t: variance exploding."""
    found, y = make("schedule", schedule), make("target", target)
    t, alpha_t, sigma_t = noisy_levels(found)
    expected = torch.cat(y.coefficients(alpha_t, sigma_t))
    assert relative(torch.cat(y.coefficients(*Scaled(found, k)(t))), expected) < 1e-12


@every("target", "schedule")
def test_coefficients_have_the_shape_and_type_of_the_level(target, schedule):
    y = make("target", target)
    for dtype in (torch.float32, torch.float64):
        level = make("schedule", schedule)(torch.linspace(0, 1, 5, dtype=dtype).view(5, 1, 1))
        for value in y.coefficients(*level):
            assert value.shape == (5, 1, 1)
            assert value.dtype == dtype


@every("target", "schedule")
def test_x_0_and_eps_come_back_from_y(target, schedule):
    """As exactly as float64 can: each is off by its own noise-to-signal ratio times the rounding."""
    y = make("target", target)
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    x_0, eps = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    x_t, value = alpha_t * x_0 + sigma_t * eps, y(x_0, eps, alpha_t, sigma_t)
    assert ((y.to_x_0(value, x_t, alpha_t, sigma_t) - x_0).abs() / (1 + sigma_t / alpha_t)).max() < 1e-13
    assert ((y.to_eps(value, x_t, alpha_t, sigma_t) - eps).abs() / (1 + alpha_t / sigma_t)).max() < 1e-13


@every("target", "schedule")
def test_the_two_estimates_make_x_t(target, schedule):
    """For any output of a network, not only the true y."""
    y = make("target", target)
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    x_t, output = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    x_0_hat, eps_hat = y.to_x_0(output, x_t, alpha_t, sigma_t), y.to_eps(output, x_t, alpha_t, sigma_t)
    scale = 1 + (alpha_t * x_0_hat).abs()
    assert ((alpha_t * x_0_hat + sigma_t * eps_hat - x_t).abs() / scale).max() < 1e-12
    assert ((y(x_0_hat, eps_hat, alpha_t, sigma_t) - output).abs() / scale).max() < 1e-11


@every("target", "schedule")
def test_precision_is_the_exchange_rate_of_squared_errors(target, schedule):
    y = make("target", target)
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    x_0, eps = normals(len(alpha_t), 64, seed=1), normals(len(alpha_t), 64, seed=2)
    x_t, value = alpha_t * x_0 + sigma_t * eps, y(x_0, eps, alpha_t, sigma_t)
    output = value + normals(len(alpha_t), 64, seed=3)
    error_y = (output - value).square().sum(1)
    error_x_0 = (y.to_x_0(output, x_t, alpha_t, sigma_t) - x_0).square().sum(1)
    ratio = y.precision(alpha_t, sigma_t)[:, 0] * error_x_0 / error_y
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-10)


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_the_weight_formula_is_the_precision(target):
    """The text that people read, evaluated."""
    y = make("target", target)
    for schedule in OPTIONS["schedule"]:
        _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
        formula = eval(y.snr_weight, {"SNR": (alpha_t / sigma_t) ** 2}) + torch.zeros_like(alpha_t)
        torch.testing.assert_close(y.precision(alpha_t, sigma_t), formula, rtol=1e-12, atol=0)


@every("schedule")
def test_the_three_targets_in_closed_form(schedule):
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    x_0, eps = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    expected = {"x0": x_0, "eps": eps, "v": (alpha_t * eps - sigma_t * x_0) / torch.hypot(alpha_t, sigma_t)}
    for name, value in expected.items():
        torch.testing.assert_close(make("target", name)(x_0, eps, alpha_t, sigma_t), value, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_diffusers_has_the_same_velocity(name, theirs):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(beta_schedule=theirs, beta_start=1e-4, beta_end=0.02)
    index = torch.arange(0, 1000, 37)
    alpha_t, sigma_t = make("schedule", name)(index.double()[:, None] / 999)
    x_0, eps = normals(len(index), 8, seed=1), normals(len(index), 8, seed=2)
    velocity = reference.get_velocity(x_0.float(), eps.float(), index)
    assert relative(V()(x_0, eps, alpha_t, sigma_t), velocity.double()) < 1e-5
    added = reference.add_noise(x_0.float(), eps.float(), index)
    assert relative(alpha_t * x_0 + sigma_t * eps, added.double()) < 1e-5


def test_v_estimates_stay_bounded_where_x_0_and_eps_vanish():
    """At the clean level and at pure noise."""
    one, nothing = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    output, x_t = normals(1, 8, seed=1), normals(1, 8, seed=2)
    for level in ((one, nothing), (nothing, one)):
        assert torch.equal(V().to_x_0(output, x_t, *level), x_t if level[0] else -output)
        assert torch.equal(V().to_eps(output, x_t, *level), output if level[0] else x_t)
